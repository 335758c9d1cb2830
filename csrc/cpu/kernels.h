// Arguments and declarations of the CPU kernels, shared by every instruction set and by the bindings.
//
// T rows, V columns, J targets per row.
#pragma once

#include <cstdint>

#include "../core/arguments.h"

namespace dam {

struct Shape {
  int64_t rows, columns;
  int dtype;  // of core/dtype.h
  int threads;
};

// Per tile of a row, SCRATCH_ARRAYS doubles; the arrays' length is a multiple of any vector's.
constexpr int SCRATCH_ARRAYS = 5;
struct Scratch {
  double* data;  // [threads, SCRATCH_ARRAYS, length]
  int64_t length;
};

struct JumpArgs {
  Shape shape;
  Scratch scratch;
  Matrix logits;
  Indices exclude;
  Indices row_ids;
  double temperature;
  int64_t num_samples;
  uint64_t seed;
  int64_t* target;    // [T, num_samples]
  float* log_prob;    // [T, num_samples]
  float* log_escape;  // [T]
};

struct LogProbArgs {
  Shape shape;
  Scratch scratch;
  Matrix logits;
  Indices exclude;
  double temperature;
  const int64_t* target;  // [T, J]
  int64_t targets;        // J
  float* log_prob;        // [T, J]
  double* log_escape;     // [T]
};

struct LogProbBackwardArgs {
  Shape shape;
  Matrix logits;
  Indices exclude;
  double temperature;
  const int64_t* target;     // [T, J]
  int64_t targets;           // J
  const double* upstream;    // [T, J]
  const double* log_escape;  // [T]
  void* gradient;            // [T, V], contiguous, the logits' dtype; may be the logits
};

struct MatchingLossArgs {
  Shape shape;
  Scratch scratch;
  Matrix logits;
  Matrix base;  // null: none
  Indices exclude;
  const int64_t* target;      // [T, J]
  int64_t targets;            // J
  const double* weight;       // [T, J]
  const double* base_weight;  // [T]
  const double* row_scale;    // [T]
  bool normalized;
  double* loss;    // [T], each times its row_scale
  void* gradient;  // [T, V], contiguous, the logits' dtype; may be the logits; null: not wanted
};

struct RateRatioArgs {
  Shape shape;
  Scratch scratch;
  Matrix logits;
  Matrix base;
  Indices exclude;
  const int64_t* target;  // [T, J]
  int64_t targets;        // J
  float* log_ratio;       // [T, J]
  float* escape_gap;      // [T]
};

struct AdjointWeightsArgs {
  int64_t groups, size, steps;  // G, K, S
  int dtype, threads;
  double* scratch;  // [threads, K]
  Cube log_ratio;
  Cube escape_gap;              // null: none
  const double* terminal_cost;  // [G, K]
  double clip;                  // inf: none
  bool stream;                  // log_path is larger than the caches
  float* weight;                // [G, K]
  float* log_path;              // [G, K, S + 1]
  float* log_normalizer;        // [G]
  float* ess;                   // [G]
  float* clipped;               // [G]
};

struct TiltToEssArgs {
  int64_t groups, size;  // G, K
  int threads;
  double* scratch;       // [threads, length]
  int64_t length;        // K or more, a multiple of any vector's
  const double* reward;  // [G, K]
  double ess, max_tilt;
  double* tilt;  // [G]
};

// backward_kolmogorov where exp(duration Q) has a closed form: uniform or absorbing.
struct ClosedFormArgs {
  Shape shape;
  Scratch scratch;
  Matrix terminal;
  int64_t mask_token;  // -1: uniform
  double stays;        // exp(-duration)
  double moves;        // 1 - exp(-duration)
  bool transpose;
  float* result;  // [B, V], contiguous
};

// backward_kolmogorov along one dimension of a lattice.
constexpr int64_t FILTER_SEGMENT = 2048;  // results made from one load of the scratch
constexpr int64_t FILTER_WIDTH = 8;       // lines side by side
constexpr int64_t FILTER_PADDING = 32;
constexpr int64_t filter_scratch(int64_t radius) {  // doubles per thread
  return 2 * (FILTER_SEGMENT + FILTER_PADDING) + 2 * radius * FILTER_WIDTH;
}
struct FilterArgs {
  int64_t outer, length, inner;
  bool periodic;
  const double* taps;  // [radius + 1]
  int64_t radius;
  const double* source;  // [outer, length, inner]
  double* result;        // [outer, length, inner]
  int threads;
  double* scratch;  // [threads, filter_scratch(radius)]
};

// Entry points of one instruction set.
struct Kernels {
  int64_t (*jump)(const JumpArgs&);  // the first row that cannot be sampled, or -1
  void (*log_prob)(const LogProbArgs&);
  void (*log_prob_backward)(const LogProbBackwardArgs&);
  void (*matching_loss)(const MatchingLossArgs&);
  void (*rate_ratio)(const RateRatioArgs&);
  // The first trajectory, as g * K + k, that no weight or tilt can be given to, or -1.
  int64_t (*adjoint_weights)(const AdjointWeightsArgs&);
  int64_t (*tilt_to_ess)(const TiltToEssArgs&);
  void (*closed_form)(const ClosedFormArgs&);
  void (*filter_lines)(const FilterArgs&);
  void (*exp)(const float* x, float* result, int64_t count, double scale);
  void (*exponential)(const uint32_t* words, double* result, int64_t count);  // words [count, 2]: high, low
  void (*philox)(const uint32_t* counter, const uint32_t* key, uint32_t* words);
  uint64_t (*read)(const uint64_t* data, int64_t count, int threads);
};

#define DAM_DECLARE_KERNELS(ISA)                                  \
  inline namespace ISA {                                          \
  int64_t jump(const JumpArgs&);                                  \
  void log_prob(const LogProbArgs&);                              \
  void log_prob_backward(const LogProbBackwardArgs&);             \
  void matching_loss(const MatchingLossArgs&);                    \
  void rate_ratio(const RateRatioArgs&);                          \
  int64_t adjoint_weights(const AdjointWeightsArgs&);             \
  int64_t tilt_to_ess(const TiltToEssArgs&);                      \
  void closed_form(const ClosedFormArgs&);                        \
  void filter_lines(const FilterArgs&);                           \
  void probe_exp(const float*, float*, int64_t, double);          \
  void probe_exponential(const uint32_t*, double*, int64_t);      \
  void probe_philox(const uint32_t*, const uint32_t*, uint32_t*); \
  uint64_t probe_read(const uint64_t*, int64_t, int);             \
  }

}  // namespace dam
