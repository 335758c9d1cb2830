// Every kernel of csrc/cpu in the instruction set `plain`, over inputs that are the same on every machine. Standard output
// gets each array that they fill, after a line "NAME KIND COUNT" with KIND int64, uint32, float64, float32, bfloat16 or
// float16. tests/cpu/test_arm.py compares those of two machines. Exits with 1 and a message where a kernel writes past
// an array's end.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/pages.h"
#include "../../csrc/cpu/rows.h"

namespace dam {

#define DAM_SET plain
#include "../../csrc/cpu/isa.def"

static const Kernels kernels = tables::plain();

// run(args): the kernel, with what follows from the arguments and with its work memory, as the bindings call it.
#define TAKES(type, name)
#define ROWS(shape, name)
#define TARGETS(name, count)
#define LOOKS(type, name, as)
#define MAKES(type, name, sizes)
#define READS(type, name)
#define FILLS(type, name)
#define FILLS_LARGE(type, name, bytes)
#define KNOWN(type, name, value) a.name = value;
#define WORK(type, name, count)            \
  std::vector<type> name##_memory(count); \
  a.name = name##_memory.data();
#define SCRATCH(name)                                                                                \
  a.name.length = scratch_length(a.shape.columns);                                                   \
  std::vector<double> name##_memory(a.shape.threads* SCRATCH_ARRAYS* a.name.length); \
  a.name.data = name##_memory.data();
#define OP(name, Name, result, does, members) \
  [[maybe_unused]] static result run(Name##Args a) { \
    members;                                  \
    return kernels.name(a);                   \
  }
#include "../../csrc/cpu/ops.def"

// splitmix64, of integers alone.
static uint64_t random_state = 0;
static uint64_t random_bits() {
  uint64_t z = random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
// Of 2^20 numbers from -1 to 1, which float32 holds as they are.
static float uniform() { return static_cast<float>(static_cast<int64_t>(random_bits() >> 43)) * 0x1p-20f - 1.0f; }

static const char* kind_of(int64_t) { return "int64"; }
static const char* kind_of(uint32_t) { return "uint32"; }
static const char* kind_of(double) { return "float64"; }
static const char* kind_of(float) { return "float32"; }
static const char* kind_of(bfloat16) { return "bfloat16"; }
static const char* kind_of(float16) { return "float16"; }

template <class T>
static void show(const std::string& name, const T* data, size_t count) {
  std::printf("%s %s %zu\n", name.c_str(), kind_of(T{}), count);
  std::fwrite(data, sizeof(T), count, stdout);
}

// An array to fill, and bytes past its end that must stay as they are.
template <class T>
class Filled {
 public:
  explicit Filled(size_t count) : count_(count), bytes_(count * sizeof(T) + GUARD, 0xA5) {}
  T* data() { return reinterpret_cast<T*>(bytes_.data()); }

  void show(const std::string& name) {
    for (size_t i = count_ * sizeof(T); i < bytes_.size(); ++i) {
      if (bytes_[i] != 0xA5) {
        std::fprintf(stderr, "%s: written past its end\n", name.c_str());
        std::exit(1);
      }
    }
    dam::show(name, data(), count_);
  }

 private:
  static constexpr size_t GUARD = 256;
  size_t count_;
  std::vector<unsigned char> bytes_;
};

constexpr int64_t T = 7, J = 2, SAMPLES = 5, ROOM = 3;

// Rows of logits that lie ROOM elements apart, with NaN in between: moderate ones, a peaked one, one of -inf here and
// there, one of large numbers, one of float16's subnormals, one with a NaN.
template <class Element>
static std::vector<Element> logits_of(int64_t columns) {
  std::vector<Element> all(T * (columns + ROOM));
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t v = 0; v < columns + ROOM; ++v) {
      float x = 4.0f * uniform();
      if (t == 2 && v == columns / 2) x = 25.0f;
      if (t == 3 && random_bits() % 3 == 0) x = -HUGE_VALF;
      if (t == 4) x *= 200.0f;
      if (t == 5) x *= 0x1p-18f;
      if ((t == 6 && v == columns / 3) || v >= columns) x = NAN;
      store_one(&all[t * (columns + ROOM) + v], x);
    }
  }
  return all;
}

template <class Element>
static void show_rows(const std::string& name, int64_t columns, double temperature, bool suppresses) {
  const int dtype = static_cast<int>(std::is_same_v<Element, float>      ? Dtype::float32
                                     : std::is_same_v<Element, bfloat16> ? Dtype::bfloat16
                                                                         : Dtype::float16);
  const auto logits = logits_of<Element>(columns), base = logits_of<Element>(columns);
  show(name + "/logits", logits.data(), logits.size());
  const Shape shape{T, columns, dtype, 1};
  const Matrix logits_at{logits.data(), columns + ROOM}, base_at{base.data(), columns + ROOM};

  std::vector<uint8_t> bits(tile_count(columns) * (TILE / 8));
  if (suppresses) {
    for (int64_t v = 3; v < columns; v += v < 1024 ? 11 : 97) bits[v / 8] |= 1 << v % 8;
  }
  const uint8_t* const suppressed = suppresses ? bits.data() : nullptr;
  std::vector<int64_t> exclude(T), target(T * J), row_ids(T);
  std::vector<double> upstream(T * J), weight(T * J), base_weight(T), row_scale(T);
  for (int64_t t = 0; t < T; ++t) {
    exclude[t] = t % 2 ? -1 : 37 * t % columns;
    row_ids[t] = 1000 + 3 * t;
    base_weight[t] = t == 1 ? 0.0 : 1.0 + 0.25 * static_cast<double>(t);
    row_scale[t] = 0.5 + static_cast<double>(t);
    for (int64_t j = 0; j < J; ++j) {
      const int64_t v = (13 * t + 5 * j) % columns;
      const bool out = suppresses && (bits[v / 8] >> v % 8 & 1);
      target[t * J + j] = out || (t == 1 && j == 1) ? -1 : v;
      upstream[t * J + j] = uniform();
      weight[t * J + j] = 1.0 + uniform();
    }
  }
  const Indices exclude_at{exclude.data(), 1};

  Filled<double> log_escape(T);
  {
    Filled<float> log_prob(T * J);
    run(LogProbArgs{shape, logits_at, exclude_at, suppressed, temperature, target.data(), J, log_prob.data(),
                    log_escape.data(), {}});
    log_prob.show(name + "/log_prob");
    log_escape.show(name + "/log_prob/log_escape");
    Filled<Element> gradient(T * columns);
    run(LogProbBackwardArgs{shape, logits_at, exclude_at, suppressed, temperature, target.data(), J, upstream.data(),
                            log_escape.data(), gradient.data()});
    gradient.show(name + "/log_prob/gradient");
  }
  for (const double jump_temperature : {temperature, 0.0}) {
    const std::string which = name + (jump_temperature == 0.0 ? "/greedy" : "/jump");
    Filled<int64_t> drawn(T * SAMPLES);
    Filled<float> log_prob(T * SAMPLES), escape(T);
    const int64_t bad =
        run(JumpArgs{shape, logits_at, exclude_at, suppressed, Indices{row_ids.data(), 1}, jump_temperature, SAMPLES,
                     0x123456789ABCDEF0u, drawn.data(), log_prob.data(), escape.data(), {}});
    show(which + "/first_bad", &bad, 1);
    drawn.show(which + "/target");
    log_prob.show(which + "/log_prob");
    escape.show(which + "/log_escape");
    Filled<double> arrival(2 * T * SAMPLES), exact(T);
    run(JumpPartArgs{shape, logits_at, exclude_at, suppressed, Indices{row_ids.data(), 1}, jump_temperature, SAMPLES,
                     0x123456789ABCDEF0u, 7, drawn.data(), arrival.data(), exact.data(), {}});
    drawn.show(which + "/part");
    arrival.show(which + "/part/arrival");
    exact.show(which + "/part/log_escape");
  }
  for (const bool has_base : {true, false}) {
    std::vector<double> shares(4 * T);
    for (int64_t t = 0; t < T; ++t) {
      const double top = temperature * log_escape.data()[t];  // about the largest logit
      const double share[4] = {1.0 + upstream[t], top, t == 1 ? 0.0 : 0.5, top + 1.0};
      std::copy(share, share + 4, shares.begin() + 4 * t);
    }
    Filled<Element> gradient(T * columns);
    run(GradientArgs{shape, logits_at, has_base ? base_at : Matrix{}, 5, exclude_at, suppressed, target.data(), J,
                     weight.data(), shares.data(), temperature, gradient.data()});
    gradient.show(name + (has_base ? "/shares/base" : "/shares") + "/gradient");
  }
  for (const bool normalized : {true, false}) {
    for (const bool has_base : {true, false}) {
      const std::string which =
          name + "/matching_loss/" + (normalized ? "normalized" : "rates") + (has_base ? "/base" : "");
      Filled<double> loss(T);
      Filled<Element> gradient(T * columns);
      run(MatchingLossArgs{shape, logits_at, has_base ? base_at : Matrix{}, exclude_at, suppressed, target.data(), J,
                           weight.data(), base_weight.data(), row_scale.data(), normalized, temperature, loss.data(),
                           gradient.data(), {}});
      loss.show(which);
      gradient.show(which + "/gradient");
    }
  }
  {
    Filled<float> log_ratio(T * J), escape_gap(T);
    run(RateRatioArgs{shape, logits_at, base_at, exclude_at, suppressed, target.data(), J, log_ratio.data(),
                      escape_gap.data(), {}});
    log_ratio.show(name + "/rate_ratio");
    escape_gap.show(name + "/rate_ratio/escape_gap");
  }
  {
    Filled<float> entropy(T);
    run(EntropyArgs{shape, logits_at, exclude_at, suppressed, temperature, entropy.data(), log_escape.data(), {}});
    entropy.show(name + "/entropy");
    std::vector<double> given(T);  // of the same digits on every machine
    for (int64_t t = 0; t < T; ++t) given[t] = std::round(entropy.data()[t] * 1024.0) / 1024.0;
    Filled<Element> gradient(T * columns);
    run(EntropyBackwardArgs{shape, logits_at, exclude_at, suppressed, temperature, given.data(), log_escape.data(),
                            upstream.data(), upstream.data() + T, gradient.data()});
    gradient.show(name + "/entropy/gradient");
  }
  for (const int64_t mask : {int64_t{-1}, columns / 2}) {
    for (const bool transpose : {false, true}) {
      Filled<float> result(T * columns);
      run(ClosedFormArgs{shape, base_at, mask, 0.75, 0.25, transpose, result.data(), {}});
      result.show(name + "/closed_form/" + (mask < 0 ? "uniform" : "absorbing") + (transpose ? "/transpose" : ""));
    }
  }
}

template <class Element>
static void show_adjoint_weights(const std::string& name, int dtype) {
  const int64_t groups = 3, size = 7, steps = 41;
  std::vector<Element> gain(groups * size * steps), gap(groups * size * steps);
  std::vector<double> cost(groups * size);
  for (auto& x : gain) store_one(&x, 0.25f * uniform());
  for (auto& x : gap) store_one(&x, 0.25f * uniform());
  for (auto& x : cost) x = 2.0 * uniform();
  cost[size + 2] = HUGE_VAL;   // forbidden
  cost[2 * size + 4] = NAN;    // has no weight
  for (const bool stream : {false, true}) {
    Filled<float> weight(groups * size), log_path(groups * size * (steps + 1));
    Filled<float> log_normalizer(groups), ess(groups), clipped(groups);
    std::vector<double> scratch(size);
    // By the kernel itself: what is past the caches is more than a test may hold.
    AdjointWeightsArgs a{groups, size, steps, dtype, 1, {gain.data(), size * steps, steps},
                         {gap.data(), size * steps, steps}, cost.data(), 0.5, weight.data(), log_path.data(),
                         log_normalizer.data(), ess.data(), clipped.data(), stream, scratch.data()};
    const int64_t bad = kernels.adjoint_weights(a);
    const std::string which = name + (stream ? "/stream" : "");
    show(which + "/first_bad", &bad, 1);
    log_path.show(which + "/log_path");
    // The last group has no weights.
    show(which + "/weight", weight.data(), (groups - 1) * size);
    show(which + "/log_normalizer", log_normalizer.data(), groups - 1);
    show(which + "/ess", ess.data(), groups - 1);
    show(which + "/clipped", clipped.data(), groups - 1);
  }
}

static void show_tilt_to_ess() {
  const int64_t groups = 5, size = 13;
  std::vector<double> reward(groups * size);
  for (auto& x : reward) x = uniform();
  for (int64_t k = 0; k < size; ++k) reward[size + k] = 0.5;  // equal
  for (int64_t k = 1; k < size; ++k) reward[2 * size + k] = -HUGE_VAL;
  reward[4 * size + 3] = NAN;
  Filled<double> tilt(groups);
  const int64_t bad = run(TiltToEssArgs{groups, size, 1, reward.data(), 4.0, 1e6, tilt.data(), 0, {}});
  show("tilt_to_ess/first_bad", &bad, 1);
  show("tilt_to_ess", tilt.data(), groups - 1);
}

static void show_filter_lines(int64_t outer, int64_t length, int64_t inner, bool periodic) {
  const std::vector<double> taps = {0.5, 0.15, 0.07, 0.03};
  std::vector<double> source(outer * length * inner);
  for (auto& x : source) x = uniform();
  Filled<double> result(source.size());
  run(FilterArgs{outer, length, inner, periodic, taps.data(), 3, source.data(), result.data(), 1, {}});
  result.show("filter_lines/" + std::to_string(length) + "x" + std::to_string(inner) + (periodic ? "/periodic" : ""));
}

template <class Element>
static void show_product(const std::string& name, int dtype, int64_t rows, int64_t columns, int64_t depth) {
  std::vector<Element> hidden(rows * (depth + ROOM)), weight(columns * (depth + ROOM));
  for (auto* matrix : {&hidden, &weight}) {
    for (size_t i = 0; i < matrix->size(); ++i) {
      store_one(&(*matrix)[i], static_cast<int64_t>(i) % (depth + ROOM) < depth ? uniform() : NAN);
    }
  }
  Filled<float> result(rows * columns);
  run(ProductArgs{{rows, columns, dtype, 1}, depth, WIDENED, {hidden.data(), depth + ROOM},
                  {weight.data(), depth + ROOM}, columns, result.data(), {}, {}, {}});
  result.show(name + "/product/" + std::to_string(rows));
}

// Every 16-bit number as a float, and many floats as 16-bit numbers, by vectors and one at a time.
template <class Element>
static void show_conversions(const std::string& name) {
  std::vector<Element> narrow(1 << 16);
  Filled<float> widened(narrow.size()), one_by_one(narrow.size());
  for (size_t i = 0; i < narrow.size(); ++i) narrow[i].bits = static_cast<uint16_t>(i);
  for (size_t i = 0; i < narrow.size(); i += LANES) store(widened.data() + i, load_lanes(&narrow[i]));
  for (size_t i = 0; i < narrow.size(); ++i) one_by_one.data()[i] = load_one(&narrow[i]);
  widened.show(name + "/widened");
  one_by_one.show(name + "/widened/each");

  // Between neighbours, on the middle and just beside it; and any bits at all.
  std::vector<float> wide;
  for (int i = 0; i < 1 << 16; i += 3) {
    const uint32_t near = bit_cast<uint32_t>(widened.data()[i]);
    const uint32_t half = std::is_same_v<Element, float16> ? 1u << 12 : 1u << 15;
    for (const uint32_t bits : {near, near + half - 1, near + half, near + half + 1}) wide.push_back(bit_cast<float>(bits));
  }
  for (int i = 0; i < 1 << 14; ++i) wide.push_back(bit_cast<float>(static_cast<uint32_t>(random_bits())));
  for (int i = -60; i < 4; ++i) wide.push_back(std::ldexp(1.0f + 0.5f * uniform(), i));
  wide.resize(wide.size() / LANES * LANES);
  Filled<Element> narrowed(wide.size()), narrowed_each(wide.size());
  for (size_t i = 0; i < wide.size(); i += LANES) store_lanes(narrowed.data() + i, load<f32>(&wide[i]));
  for (size_t i = 0; i < wide.size(); ++i) store_one(narrowed_each.data() + i, wide[i]);
  narrowed.show(name + "/narrowed");
  narrowed_each.show(name + "/narrowed/each");
}

static void show_probes() {
  std::vector<float> x(4099);
  for (auto& each : x) each = 45.0f * uniform() - 45.0f;
  x[5] = -HUGE_VALF, x[6] = NAN, x[7] = 0.0f, x[8] = -0.0f;
  for (const double scale : {1.0, 1.0 / 0.7}) {
    Filled<float> result(x.size());
    kernels.exp(x.data(), result.data(), static_cast<int64_t>(x.size()), scale);
    result.show(scale == 1.0 ? "exp/unit" : "exp/factor");
  }
  std::vector<uint32_t> words(2 * 1001);
  for (auto& each : words) each = static_cast<uint32_t>(random_bits());
  for (int i = 0; i < 8; ++i) words[i] = i < 4 ? 0 : ~0u;
  Filled<double> exponential(words.size() / 2);
  kernels.exponential(words.data(), exponential.data(), static_cast<int64_t>(words.size() / 2));
  exponential.show("exponential");

  std::vector<uint32_t> blocks;
  for (int i = 0; i < 50; ++i) {
    uint32_t counter[4], key[2], block[4];
    for (auto& each : counter) each = static_cast<uint32_t>(random_bits());
    for (auto& each : key) each = static_cast<uint32_t>(random_bits());
    kernels.philox(counter, key, block);
    blocks.insert(blocks.end(), block, block + 4);
  }
  show("philox", blocks.data(), blocks.size());

  std::vector<uint64_t> data(100'003);
  for (auto& each : data) each = random_bits();
  const int64_t total = static_cast<int64_t>(kernels.read(data.data(), static_cast<int64_t>(data.size()), 1));
  show("read", &total, 1);
}

template <class Element>
static void show_dtype(const std::string& name, int dtype) {
  random_state = 1;
  for (const int64_t columns : {1, 37, 1024, 2500}) {
    for (const double temperature : {1.0, 0.7}) {
      const bool suppresses = (columns > 1) == (temperature != 1.0);
      show_rows<Element>(name + "/" + std::to_string(columns) + (temperature == 1.0 ? "/cold" : "/warm"), columns,
                         temperature, suppresses);
    }
  }
  show_adjoint_weights<Element>(name + "/adjoint_weights", dtype);
  if constexpr (!std::is_same_v<Element, float>) {
    for (const int64_t rows : {1, 2, 3, 4, 5, 9, 15, 33}) show_product<Element>(name, dtype, rows, 43, 141);
    show_conversions<Element>(name);
  }
}

}  // namespace dam

int main() {
  using namespace dam;
  show_dtype<float>("float32", 0);
  show_dtype<bfloat16>("bfloat16", 1);
  show_dtype<float16>("float16", 2);
  show_tilt_to_ess();
  for (const bool periodic : {false, true}) {
    show_filter_lines(3, 100, 1, periodic);
    show_filter_lines(2, 50, 11, periodic);
    show_filter_lines(1, 2500, 1, periodic);
  }
  show_probes();
  return 0;
}
