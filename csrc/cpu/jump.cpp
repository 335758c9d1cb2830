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

  double time() const { return time_; }

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

// Among a row's tiles, which are numbered from `first` on; mass has zeros up to a multiple of WIDE.
static Race race_tiles(const double* mass, int64_t count, int64_t first, Stream stream) {
  Race race;
  for (int64_t k = 0; k < count; k += WIDE) {
    const Words<u64> words = philox(iota<u64>() + static_cast<uint64_t>(first + k), stream);
    const f64 rate = load<f64>(mass + k);
    if (race.open(words.x, rate)) race.enter(words.x, words.y, rate, iota<f64>() + static_cast<double>(k));
  }
  return race;
}

// Among the `count` tokens of the tile of this number, rates relative to anything; zeros up to the tile's width.
static Race race_tokens(const float* rate, int64_t count, int64_t tile, Stream stream) {
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
  return race;
}

static int64_t argmax(const float* x, float max) {
  int i = 0;
  while (i < TILE - 1 && x[i] != max) ++i;
  return i;
}

// A destination, and the logarithms of when its tile and it arrived; -1 and infinity for none.
struct Drawn {
  int64_t target = -1;
  double tile = HUGE_VAL, token = HUGE_VAL;
};

// Draws the destinations of a row whose tiles are numbered from first_tile on, and calls store(sample, drawn, log_prob)
// for each; false if it cannot be sampled. Without TIMED a race of one is none.
template <bool TIMED, class Element, class Args, class Store>
static bool draw_row(const Args& a, int64_t t, int64_t first_tile, int threads, Tiles tiles, Store store) {
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const bool greedy = a.temperature == 0.0;
  const double scale = greedy ? 1.0 : 1.0 / a.temperature;
  const Summary total = sum_row(row, scale, threads, tiles);
  const bool reachable = total.sum > 0.0;  // false for NaN
  const double log_sum = std::log(total.sum);
  using Escape = std::decay_t<decltype(a.log_escape[0])>;
  a.log_escape[t] = static_cast<Escape>(log_total(total, scale));
  for (int64_t k = tiles.count; k < a.scratch.length; ++k) tiles.sum[k] = 0.0;

  alignas(64) float buffer[TILE], rate[TILE];
  int64_t raced = -1;  // the tile that `rate` belongs to
  for (int64_t s = 0; s < a.num_samples; ++s) {
    Drawn drawn;
    if (reachable && greedy) {
      int64_t tile = 0;
      while (tile < tiles.count - 1 && tiles.max[tile] != total.max) ++tile;
      drawn.target = tile * TILE + argmax(row.template load_tile<true>(tile, buffer), static_cast<float>(total.max));
      drawn.tile = drawn.token = -total.max;
    } else if (reachable) {
      const int64_t id = a.row_ids.data ? a.row_ids.data[t * a.row_ids.stride] : t;
      const uint32_t sample = static_cast<uint32_t>(s);
      Stream stream{a.seed, static_cast<uint64_t>(id), TILE_STREAM + sample};
      int64_t tile = 0;
      if (TIMED || tiles.count > 1) {
        const Race race = race_tiles(tiles.sum, tiles.count, first_tile, stream);
        tile = race.winner();
        if (TIMED) drawn.tile = std::log(race.time()) - scale * pivot(total.max);
      }
      const float p = static_cast<float>(pivot(tiles.max[tile]));
      if (tile != raced) {
        const float* x = row.template load_tile<true>(tile, buffer);
        with_scale(scale, [&](auto factor) { scaled_exp_tile<false>(rate, x, row.width(tile), p, factor, 1.0f, x); });
        raced = tile;
      }
      stream.sample_stream = TOKEN_STREAM + sample;
      const Race race = race_tokens(rate, row.count(tile), first_tile + tile, stream);
      drawn.target = tile * TILE + race.winner();
      if (TIMED) drawn.token = std::log(race.time()) - scale * p;
    }
    store(s, drawn, drawn.target < 0 ? -HUGE_VAL : scale * (row.at(drawn.target) - total.max) - log_sum);
  }
  return reachable;
}

int64_t jump(const JumpArgs& a) {
  FirstBad first_bad;
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int worker, int threads) {
      const Tiles tiles = scratch_tiles(a.scratch, worker, a.shape.columns);
      const auto store = [&](int64_t s, const Drawn& drawn, double log_prob) {
        a.target[t * a.num_samples + s] = drawn.target;
        a.log_prob[t * a.num_samples + s] = static_cast<float>(log_prob);
      };
      if (!draw_row<false, decltype(element)>(a, t, 0, threads, tiles, store)) first_bad.enter(t);
    });
  });
  return first_bad.index();
}

void jump_part(const JumpPartArgs& a) {
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int worker, int threads) {
      const Tiles tiles = scratch_tiles(a.scratch, worker, a.shape.columns);
      const auto store = [&](int64_t s, const Drawn& drawn, double) {
        const int64_t at = t * a.num_samples + s;
        a.target[at] = drawn.target;
        a.arrival[2 * at] = drawn.tile;
        a.arrival[2 * at + 1] = drawn.token;
      };
      draw_row<true, decltype(element)>(a, t, a.first_tile, threads, tiles, store);
    });
  });
}

DAM_END
