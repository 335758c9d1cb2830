// jump: one read of a row gives the mass of each tile; a race among the tiles chooses one of them, a race inside it the
// destination. Contract: dam/ops/jump.py; random stream: dam/ops/_philox.py.
#include "../core/race.h"
#include "rows.h"

DAM_BEGIN

// The earliest of many events. Which of them may still win is asked before their logarithms are taken.
class Race {
 public:
  // False if none of the events can be first, by the high words of their exponentials: -log(1 - u) >= u, and the low
  // words only add to u. A millionth covers the rounding of both sides.
  bool open(u64 high, f64 rate) const { return any(from_word<f64>(high) * (0x1p-32 * (1 - 1e-6)) <= rate * time_); }

  void enter(u64 high, u64 low, f64 rate, f64 at) {
    first_.enter(exponential<f64>(high, low), rate, at);
    time_ = fold(first_.time, [](auto a, auto b) { return a < b ? a : b; });
  }

  int64_t winner() const {
    double index = HUGE_VAL;
    for (int i = 0; i < WIDE; ++i) {
      if (first_.time[i] == time_ && first_.index[i] < index) index = first_.index[i];
    }
    return static_cast<int64_t>(index);
  }

 private:
  Earliest<f64> first_;
  double time_ = HUGE_VAL;
};

// The first tile to arrive; mass has zeros up to a multiple of WIDE.
static int64_t race_tiles(const double* mass, int64_t count, Stream stream) {
  if (count == 1) return 0;
  Race race;
  for (int64_t k = 0; k < count; k += WIDE) {
    const Words<u64> words = philox(iota<u64>() + static_cast<uint64_t>(k), stream);
    const f64 rate = load<f64>(mass + k);
    if (race.open(words.x, rate)) race.enter(words.x, words.y, rate, iota<f64>() + static_cast<double>(k));
  }
  return race.winner();
}

// The first of a tile's `count` tokens to arrive, rates relative to anything; zeros up to the tile's width.
static int64_t race_tokens(const float* rate, int64_t count, int64_t tile, Stream stream) {
  constexpr int HALF = TILE / 2;
  const auto rates = [&](int i) { return load_wide(rate + i); };
  Race race;
  for (int i = 0; i < HALF && i < count; i += WIDE) {
    const uint64_t index = static_cast<uint64_t>(tile) * HALF + i;
    // One counter serves two tokens half a tile apart.
    const Words<u64> words = philox(iota<u64>() + index, stream);
    const f64 near = rates(i), far = i + HALF < count ? rates(i + HALF) : f64{};
    if (race.open(words.x, near)) race.enter(words.x, words.y, near, iota<f64>() + static_cast<double>(i));
    if (race.open(words.z, far)) race.enter(words.z, words.w, far, iota<f64>() + static_cast<double>(i + HALF));
  }
  return race.winner();
}

static int64_t argmax(const float* x, float max) {
  int i = 0;
  while (i < TILE - 1 && x[i] != max) ++i;
  return i;
}

// Draws the row's destinations; false if it cannot be sampled.
template <class Element>
static bool jump_row(const JumpArgs& a, int64_t t, int threads, Tiles tiles) {
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const bool greedy = a.temperature == 0.0;
  const double scale = greedy ? 1.0 : 1.0 / a.temperature;
  const Summary total = sum_row(row, scale, threads, tiles);
  const bool reachable = total.sum > 0.0;  // false for NaN
  const double log_sum = std::log(total.sum);
  a.log_escape[t] = static_cast<float>(log_total(total, scale));
  for (int64_t k = tiles.count; k < a.scratch.length; ++k) tiles.sum[k] = 0.0;

  alignas(64) float buffer[TILE], rate[TILE];
  int64_t raced = -1;  // the tile that `rate` belongs to
  for (int64_t s = 0; s < a.num_samples; ++s) {
    int64_t target = -1;
    if (reachable && greedy) {
      int64_t tile = 0;
      while (tile < tiles.count - 1 && tiles.max[tile] != total.max) ++tile;
      target = tile * TILE + argmax(row.template load_tile<true>(tile, buffer), static_cast<float>(total.max));
    } else if (reachable) {
      const int64_t id = a.row_ids.data ? a.row_ids.data[t * a.row_ids.stride] : t;
      const uint32_t sample = static_cast<uint32_t>(s);
      Stream stream{a.seed, static_cast<uint64_t>(id), TILE_STREAM + sample};
      const int64_t tile = race_tiles(tiles.sum, tiles.count, stream);
      if (tile != raced) {
        const float* x = row.template load_tile<true>(tile, buffer);
        const float p = static_cast<float>(pivot(tiles.max[tile]));
        with_scale(scale, [&](auto factor) { scaled_exp_tile<false>(rate, x, row.width(tile), p, factor, 1.0f, x); });
        raced = tile;
      }
      stream.sample_stream = TOKEN_STREAM + sample;
      target = tile * TILE + race_tokens(rate, row.count(tile), tile, stream);
    }
    a.target[t * a.num_samples + s] = target;
    a.log_prob[t * a.num_samples + s] =
        static_cast<float>(target < 0 ? -HUGE_VAL : scale * (row.at(target) - total.max) - log_sum);
  }
  return reachable;
}

int64_t jump(const JumpArgs& a) {
  FirstBad first_bad;
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int worker, int threads) {
      const Tiles tiles = scratch_tiles(a.scratch, worker, a.shape.columns);
      if (!jump_row<decltype(element)>(a, t, threads, tiles)) first_bad.enter(t);
    });
  });
  return first_bad.index();
}

DAM_END
