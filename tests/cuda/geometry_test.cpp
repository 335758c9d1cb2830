// How csrc/cuda divides launches over rows, as plain C++: what must hold of every plan, over many shapes and chips.
// Exits with 1 and a message at the first that does not.
#include "../../csrc/cuda/geometry.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace dam::cuda;

static const char* shape_text(int64_t rows, int64_t columns, const Chip& chip, bool reread) {
  static char text[200];
  std::snprintf(text, sizeof(text), "%lld rows of %lld columns, %d multiprocessors, clusters %d, reread %d",
                static_cast<long long>(rows), static_cast<long long>(columns), chip.multiprocessors, chip.clusters,
                reread);
  return text;
}

#define EXPECT(condition)                                                                              \
  do {                                                                                                 \
    if (!(condition)) {                                                                                \
      std::printf("line %d: %s; %s\n", __LINE__, #condition, shape_text(rows, columns, chip, reread)); \
      std::exit(1);                                                                                    \
    }                                                                                                  \
  } while (false)

static void test_every_tile_of_every_row_has_one_team(int64_t rows, int64_t columns, const Chip& chip, bool reread) {
  const RowPlan plan = plan_rows(rows, columns, columns * 2, reread, 4, chip);
  EXPECT(plan.rows == rows);
  EXPECT(plan.tiles == (columns + 1023) / 1024);
  if (plan.team_warps == 1) {
    EXPECT(plan.splits == 1 && !plan.clustered);
    EXPECT(plan.blocks * WARPS_PER_BLOCK >= rows && (plan.blocks - 1) * WARPS_PER_BLOCK < rows);
    return;
  }
  EXPECT(plan.team_warps == WARPS_PER_BLOCK);
  EXPECT(plan.blocks == rows * plan.splits);
  // Splits side by side cover the tiles, and none begins past the last one: it would have nothing to read.
  EXPECT(int64_t{plan.splits} * plan.split_tiles >= plan.tiles);
  EXPECT(int64_t{plan.splits - 1} * plan.split_tiles < plan.tiles);
  // A split has a tile for each of a block's warps, but where a power of two of them does not come out even.
  if (plan.splits > 1) EXPECT(2 * plan.split_tiles > WARPS_PER_BLOCK);
}

static void test_blocks_that_wait_for_each_other_are_a_cluster(int64_t rows, int64_t columns, const Chip& chip,
                                                               bool reread) {
  const RowPlan plan = plan_rows(rows, columns, columns * 4, reread, 3, chip);
  if (plan.clustered) {
    EXPECT(chip.clusters);
    EXPECT(plan.splits > 1 && plan.splits <= MOST_CLUSTERED && (plan.splits & (plan.splits - 1)) == 0);
  }
  EXPECT(plan.one_launch() == (plan.splits == 1 || plan.clustered));
  if (chip.clusters) EXPECT(plan.one_launch());
}

static void test_enough_rows_are_not_split(int64_t rows, int64_t columns, const Chip& chip, bool reread) {
  const RowPlan plan = plan_rows(rows, columns, columns * 2, false, 4, chip);
  if (rows >= int64_t{chip.multiprocessors} * 4) EXPECT(plan.splits == 1);
}

// Rows of one to four waves of blocks, for a cluster of two each where they have tiles enough; others as without.
static void test_long_ends_are_shared_by_two(int64_t rows, int64_t columns, const Chip& chip, bool reread) {
  const RowPlan plan = plan_rows(rows, columns, columns * 2, false, 4, chip, true);
  const RowPlan without = plan_rows(rows, columns, columns * 2, false, 4, chip);
  const int64_t resident = int64_t{chip.multiprocessors} * 4;
  if (chip.clusters && rows > resident && rows < 4 * resident && plan.tiles > WARPS_PER_BLOCK) {
    EXPECT(plan.splits == 2 && plan.clustered && plan.one_launch());
    EXPECT(2 * plan.split_tiles - plan.tiles <= 1);
  } else {
    EXPECT(plan.splits == without.splits && plan.clustered == without.clustered && plan.blocks == without.blocks);
  }
}

// Two launches for as many rows as blocks at once, none of which waits for another; others as without.
static void test_two_passes_are_two_launches_of_many_rows(int64_t rows, int64_t columns, const Chip& chip,
                                                          bool reread) {
  const RowPlan plan = plan_two_passes(rows, columns, columns * 4, 2, chip);
  const RowPlan without = plan_rows(rows, columns, columns * 4, true, 2, chip);
  if (without.clustered && rows >= int64_t{chip.multiprocessors} * 2) {
    EXPECT(!plan.one_launch() && !plan.clustered && plan.splits == 1 && plan.blocks == rows);
  } else {
    EXPECT(plan.one_launch() == without.one_launch() && plan.splits == without.splits);
    EXPECT(plan.clustered == without.clustered);
  }
}

static void test_few_long_rows_are_split(const Chip& chip) {
  const int64_t columns = 262'144;
  const bool reread = false;
  for (int64_t rows = 1; rows <= 8; ++rows) {
    const RowPlan plan = plan_rows(rows, columns, columns * 2, reread, 4, chip);
    EXPECT(plan.splits >= 8);
    if (!chip.clusters) EXPECT(plan.blocks > chip.multiprocessors / 2 || plan.split_tiles <= WARPS_PER_BLOCK);
  }
}

// What is read twice, of the rows that run at once, fits half of the cache, as far as a cluster can be split.
static void test_rows_that_are_reread_stay_in_the_cache(const Chip& chip) {
  const int64_t rows = 8192, columns = 126'464, row_bytes = 2 * 2 * columns;
  const bool reread = true;
  const RowPlan plan = plan_rows(rows, columns, row_bytes, reread, 2, chip);
  const int64_t at_once = int64_t{chip.multiprocessors} * 2 / plan.splits;
  if (chip.clusters) EXPECT(at_once * row_bytes <= chip.l2_bytes / 2 || plan.splits == MOST_CLUSTERED);
  if (!chip.clusters) EXPECT(plan.splits == 1);
}

int main() {
  const std::vector<Chip> chips = {{132, int64_t{50} << 20, true}, {108, int64_t{40} << 20, false},
                                   {16, int64_t{4} << 20, false},  {4, int64_t{8} << 20, true},
                                   {1, int64_t{1} << 20, false},   {192, int64_t{126} << 20, true}};
  const std::vector<int64_t> sizes = {1,      2,       3,       7,       8,         9,        31,     63,
                                      64,     100,     511,     528,     529,       1000,     1023,   1024,
                                      1025,   2048,    4097,    8192,    8193,      9216,     30'000, 32'768,
                                      50'257, 126'464, 151'936, 262'144, 1'000'003, 5'000'000};
  int count = 0;
  for (const Chip& chip : chips) {
    for (const int64_t rows : sizes) {
      for (const int64_t columns : sizes) {
        for (const bool reread : {false, true}) {
          test_every_tile_of_every_row_has_one_team(rows, columns, chip, reread);
          test_blocks_that_wait_for_each_other_are_a_cluster(rows, columns, chip, reread);
          test_enough_rows_are_not_split(rows, columns, chip, reread);
          test_long_ends_are_shared_by_two(rows, columns, chip, reread);
          test_two_passes_are_two_launches_of_many_rows(rows, columns, chip, reread);
          ++count;
        }
      }
    }
    if (chip.multiprocessors > 4) {
      test_few_long_rows_are_split(chip);
      test_rows_that_are_reread_stay_in_the_cache(chip);
    }
  }
  const int64_t rows = 0, columns = 1;
  const Chip& chip = chips[0];
  const bool reread = false;
  EXPECT(plan_rows(rows, columns, 2, reread, 4, chip).blocks == 0);
  EXPECT(plan_rows(rows, 126'464, 2, reread, 4, chip).blocks == 0);
  // On an H100: jump at T = 1,024, and matching_loss with a base in bfloat16.
  EXPECT(plan_rows(1024, 126'464, 2 * 126'464, false, 4, chip, true).splits == 2);
  EXPECT(!plan_two_passes(8192, 126'464, 4 * 126'464, 2, chip).one_launch());
  EXPECT(plan_two_passes(263, 126'464, 4 * 126'464, 2, chip).clustered);
  static_assert(power_of_two_below(1) == 1 && power_of_two_below(7) == 4 && power_of_two_below(8) == 8, "powers");
  std::printf("%d shapes\n", count);
  return 0;
}
