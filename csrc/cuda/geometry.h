// How launches divide their work. Plain C++ on the host, tested as such.
#pragma once

#include <cstdint>

namespace dam {
namespace cuda {

constexpr int WARPS_PER_BLOCK = 8;
constexpr int THREADS_PER_BLOCK = 32 * WARPS_PER_BLOCK;
constexpr int64_t COLUMNS_PER_TILE = 1024;
constexpr int MOST_CLUSTERED = 8;  // blocks of a cluster that every chip with clusters has room for

// What of a chip decides how work is divided.
struct Chip {
  int multiprocessors;
  int64_t l2_bytes;
  bool clusters;  // blocks of a cluster wait for each other: sm_90 and later
};

constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A launch over rows of logits. A team of warps has one row; a row of many tiles may be split among blocks.
struct RowPlan {
  int64_t rows;
  int tiles;        // of a row
  int team_warps;   // 1, or WARPS_PER_BLOCK: a block to itself
  int splits;       // blocks that share a row
  int split_tiles;  // tiles of each of them
  bool clustered;   // they are a cluster and do all in one launch; else the row's summaries are a launch of their own
  int64_t blocks;
  bool apart = false;  // they are a launch of their own in any case

  bool one_launch() const { return !apart && (splits == 1 || clustered); }
};

// Largest power of two that is at most x; 1 for less.
constexpr int64_t power_of_two_below(int64_t x) {
  int64_t power = 1;
  while (2 * power <= x) power *= 2;
  return power;
}

// Rows of `row_bytes` bytes, all arrays counted, are read; `reread` says that they are read a second time, which should
// be from the L2 cache; `long_ends` that much is done after the last tile of a row, when other rows should be read.
inline RowPlan plan_rows(int64_t rows, int64_t columns, int64_t row_bytes, bool reread, int blocks_per_multiprocessor,
                         const Chip& chip, bool long_ends = false) {
  const int tiles = static_cast<int>(divided_up(columns, COLUMNS_PER_TILE));
  RowPlan plan{rows, tiles, WARPS_PER_BLOCK, 1, tiles, false, rows};
  // A warp for a row, where there are enough of them and none is long.
  if (tiles == 1 || (tiles <= WARPS_PER_BLOCK && rows >= int64_t{WARPS_PER_BLOCK} * 4 * chip.multiprocessors)) {
    plan.team_warps = 1;
    plan.blocks = divided_up(rows, WARPS_PER_BLOCK);
    return plan;
  }
  const int64_t resident = int64_t{chip.multiprocessors} * blocks_per_multiprocessor;
  // Blocks of a row: as many as fill the chip, each with a tile for each of its warps at least.
  const int64_t most = divided_up(tiles, WARPS_PER_BLOCK);
  int64_t splits = resident / (rows > 0 ? rows : 1);
  if (chip.clusters) {
    if (reread && row_bytes > 0) {
      // And so many that what is read again, of the rows that run at once, fits half of the cache. In two launches all
      // would be read before anything is read again.
      const int64_t at_once = chip.l2_bytes / 2 / row_bytes;
      const int64_t for_cache = divided_up(resident, at_once > 0 ? at_once : 1);
      if (for_cache > 1 && for_cache > splits && rows > at_once) splits = 2 * power_of_two_below(for_cache - 1);
    }
    // Blocks that begin together end together, a few times: of two that share a row one goes on to another meanwhile.
    if (long_ends && rows > resident && rows < 4 * resident) splits = splits > 2 ? splits : 2;
    splits = splits < most ? splits : most;
    plan.splits = static_cast<int>(power_of_two_below(splits < MOST_CLUSTERED ? splits : MOST_CLUSTERED));
    plan.clustered = plan.splits > 1;
  } else {
    splits = splits < most ? splits : most;
    plan.splits = static_cast<int>(splits > 1 ? splits : 1);
  }
  plan.split_tiles = static_cast<int>(divided_up(tiles, plan.splits));
  if (!plan.clustered) plan.splits = static_cast<int>(divided_up(tiles, plan.split_tiles));  // none without a tile
  plan.blocks = rows * plan.splits;
  return plan;
}

// For rows that are read twice with much to wait for in between. Where there are as many as blocks at once, what would
// take clusters is two launches, each of which reads everything from memory at its full rate: on an H100 a cluster's
// second read came from there too, and its blocks waited for each other (benchmarks/notes.md).
inline RowPlan plan_two_passes(int64_t rows, int64_t columns, int64_t row_bytes, int blocks_per_multiprocessor,
                               const Chip& chip) {
  const RowPlan plan = plan_rows(rows, columns, row_bytes, true, blocks_per_multiprocessor, chip);
  if (!plan.clustered || rows < int64_t{chip.multiprocessors} * blocks_per_multiprocessor) return plan;
  RowPlan passes = plan_rows(rows, columns, row_bytes, false, blocks_per_multiprocessor, chip);
  passes.apart = true;
  return passes;
}

// Bytes of shared memory that a block of teams needs for their reductions.
constexpr int REDUCED_AT_ONCE = 3;
constexpr int64_t TEAM_BYTES = 2 * REDUCED_AT_ONCE * WARPS_PER_BLOCK * 8;

}  // namespace cuda
}  // namespace dam
