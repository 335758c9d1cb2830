// Arguments and declarations of the CUDA kernels, shared by the bindings. Plain C++.
//
// T rows, V columns, J targets per row. Every array lies on the device, work memory too: nothing is allocated here, and
// nothing waits for the device, so that every call can be part of a CUDA graph. A call that cannot be launched throws.
#pragma once

#include <cstdint>

#include "../core/arguments.h"

namespace dam {
namespace cuda {

// Where a call runs: index of the device, and the cudaStream_t as an address.
struct Queue {
  int device;
  uintptr_t stream;
};

struct Shape {
  int64_t rows, columns;
  int dtype;  // of core/dtype.h
};

// int64 [T, J], -1 for none.
struct Targets {
  const int64_t* data;
  int64_t row_stride, slot_stride, count;  // count: J
};

// [T] or [T, J] of any floating-point dtype.
struct Values {
  const void* data;
  int dtype;
  int64_t row_stride, slot_stride;
};

// Work memory of the ops over rows: float [arrays, T, tiles], tiles of 1024 columns.
constexpr int64_t summary_floats(int arrays, int64_t rows, int64_t columns) {
  return arrays * rows * ((columns + 1023) / 1024);
}
constexpr int ROW_SUMMARIES = 2;   // of a row of logits: maximum and excess of each tile
constexpr int BASE_SUMMARIES = 5;  // and of base logits beside them, and a cross term

// What the gradient of a row's logits x depends on, coefficient * exp(scale (x - reference)): float32 coefficient, and
// the reference as a sum of two; then the same of base logits.
constexpr int SHARES = 6;

struct JumpArgs {
  Shape shape;
  Matrix logits;
  Indices exclude;
  Indices row_ids;  // null: 0 .. T-1
  double scale;     // 1 / temperature
  bool greedy;      // temperature 0: the largest logit; the scale is 1
  int samples;
  const int64_t* seed_address;  // null: `seed`
  uint64_t seed;
  float* summaries;    // ROW_SUMMARIES
  int64_t* target;     // [T, samples]
  float* log_prob;     // [T, samples]
  float* log_escape;   // [T]
  int64_t* first_bad;  // lowered to the first row that cannot be sampled; null: not wanted
  int64_t first_row;   // of what first_bad counts
};

struct LogProbArgs {
  Shape shape;
  Matrix logits;
  Indices exclude;
  double scale;  // 1 / temperature
  Targets target;
  float* summaries;    // ROW_SUMMARIES
  float* log_prob;     // [T, J]
  double* log_escape;  // [T]
};

struct LogProbBackwardArgs {
  Shape shape;
  Matrix logits;
  Indices exclude;
  double temperature, scale;  // scale: 1 / temperature
  Targets target;
  Values upstream;           // [T, J]
  const double* log_escape;  // [T]
  float* target_gradient;    // work memory [T, J]
  Matrix gradient;           // [T, V]; may be the logits
  int gradient_dtype;        // the logits', or bfloat16 beside float32
};

struct RateRatioArgs {
  Shape shape;
  Matrix logits;
  Matrix base;
  Indices exclude;
  Targets target;
  float* summaries;   // 2 ROW_SUMMARIES
  float* log_ratio;   // [T, J]
  float* escape_gap;  // [T]
};

struct MatchingLossArgs {
  Shape shape;
  Matrix logits;
  Matrix base;  // null: none
  Indices exclude;
  Targets target;
  Values weight;       // [T, J]
  Values base_weight;  // [T], with a base
  Values row_scale;    // [T]; null: 1 / T
  bool normalized;
  float* summaries;     // ROW_SUMMARIES, or BASE_SUMMARIES with a base
  float* target_logit;  // work memory [T, J]
  double* loss;         // [T], each times its row_scale
  Matrix gradient;      // [T, V]; may be the logits; null: not wanted
  int gradient_dtype;   // the logits', or bfloat16 beside float32
  float* shares;        // [T, SHARES]; null: not wanted
  bool keeps = false;   // chosen by the launch: rows wait in shared memory for their gradient
};

// The gradient of the logits x of some columns, once it is known what it depends on: share of x - share of base logits
// - sum_j pull_j 1[v = target_j].
struct GradientArgs {
  Shape shape;  // of these columns
  Matrix logits;
  Matrix base;           // null: none
  int64_t first_column;  // where they begin in the vocabulary, which exclude and target are columns of
  Indices exclude;
  Targets target;
  Values pull;             // [T, J]
  const float* shares;     // [T, SHARES]
  double scale;            // of the logits
  float* target_gradient;  // work memory [T, J]
  Matrix gradient;         // may be the logits
  int gradient_dtype;      // the logits', or bfloat16 beside float32
};

struct AdjointWeightsArgs {
  int64_t groups, size, steps;  // G, K, S
  int dtype;
  Cube log_ratio;
  Cube escape_gap;       // null: none
  Values terminal_cost;  // [G, K]
  double clip;           // inf: none
  double* log_weight;    // work memory [G, K]
  float* weight;         // [G, K]
  float* log_path;       // [G, K, S + 1]
  float* log_normalizer;
  float* ess;
  float* clipped;      // [G] each
  int64_t* first_bad;  // lowered to the first trajectory, as g K + k, that no weight can be given to
};

struct TiltToEssArgs {
  int64_t groups, size;  // G, K
  Values reward;         // [G, K]
  double ess, max_tilt;
  double* tilt;        // [G]
  int64_t* first_bad;  // lowered to the first reward, as g K + k, that is NaN or +inf
};

// backward_kolmogorov where exp(duration Q) has a closed form: uniform or absorbing.
struct ClosedFormArgs {
  Shape shape;
  Matrix terminal;
  int64_t mask_token;  // -1: uniform
  double stays;        // exp(-duration)
  double moves;        // 1 - exp(-duration)
  bool transpose;
  double* totals;  // work memory [B, tiles]
  float* result;   // [B, V], contiguous
};

// backward_kolmogorov along one dimension of a lattice, for rows of `length` x `inner` x ... states.
constexpr int64_t FEW_TAPS = 448;  // go with the launch itself, whose arguments may take 4 kB
struct WalkArgs {
  int64_t rows, columns;  // B, V
  int64_t length, inner;  // points of a line, and the distance of neighbours
  bool periodic;
  const double* taps;         // [radius + 1], weights of a point and of those at distances 1, 2, ...; null: few_taps
  double few_taps[FEW_TAPS];  // the same, if there are no more
  int64_t radius;
  const void* source;  // [B, V]
  int source_dtype;    // float64 after the first dimension
  int64_t source_stride;
  void* result;           // [B, V], contiguous
  bool result_is_double;  // before the last dimension; else float32
  int* not_finite;        // [B], set to 1 for rows that hold something not finite
};

// Rows of float32 [rows, columns] that are marked become NaN.
struct FillArgs {
  int64_t rows, columns;
  const int* marked;  // [rows]
  float* result;
};

// gradient *= factor, of `count` entries.
struct ScaleArgs {
  void* gradient;
  int dtype;
  int64_t count;
  Values factor;  // []
};

void jump(const JumpArgs&, Queue);
void log_prob(const LogProbArgs&, Queue);
void log_prob_backward(const LogProbBackwardArgs&, Queue);
void rate_ratio(const RateRatioArgs&, Queue);
void matching_loss(const MatchingLossArgs&, Queue);
void gradient(const GradientArgs&, Queue);
void adjoint_weights(const AdjointWeightsArgs&, Queue);
void tilt_to_ess(const TiltToEssArgs&, Queue);
void closed_form(const ClosedFormArgs&, Queue);
void walk(const WalkArgs&, Queue);
void fill_with_nan(const FillArgs&, Queue);
void scale(const ScaleArgs&, Queue);

// The numerics of csrc/core as the device computes them, for the tests; arrays on the device.
void probe_exp(const float* x, float* result, int64_t count, double scale, Queue);
void probe_exponential(const uint32_t* words, float* result, int64_t count, Queue);  // words [count, 2]: high, low
void probe_philox(const uint32_t* counters, uint64_t key, uint32_t* words, int64_t count, Queue);  // [count, 4]

}  // namespace cuda
}  // namespace dam
