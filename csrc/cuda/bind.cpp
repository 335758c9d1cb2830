// Python module dam._cuda: the CUDA kernels, over addresses and sizes. Compiled with -DDAM_EMULATE, the same kernels on
// the CPU: dam._cuda_emulated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "../core/dtype.h"
#include "geometry.h"
#include "kernels.h"

#if defined(DAM_EMULATE)
#include "../emulator/emulator.h"
#define DAM_MODULE _cuda_emulated
#else
#define DAM_MODULE _cuda
#endif

namespace py = pybind11;
using namespace py::literals;

namespace dam {
namespace cuda {
namespace bind {

// How tensors arrive: the address first, 0 for one that is absent.
using MatrixTuple = std::tuple<uintptr_t, int64_t>;                     // address, row stride
using IndicesTuple = std::tuple<uintptr_t, int64_t>;                    // address, stride
using TargetsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides, J
using ValuesTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;       // address, dtype, strides
using CubeTuple = std::tuple<uintptr_t, int64_t, int64_t>;              // address, group and row stride
using ShapeTuple = std::tuple<int64_t, int64_t, int>;                   // rows, columns, dtype
using QueueTuple = std::tuple<int, uintptr_t>;                          // device, stream

template <class T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
static Matrix matrix(const MatrixTuple& x) { return {at<void>(std::get<0>(x)), std::get<1>(x)}; }
static Indices indices(const IndicesTuple& x) { return {at<int64_t>(std::get<0>(x)), std::get<1>(x)}; }
static Targets targets(const TargetsTuple& x) {
  return {at<int64_t>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}
static Values values(const ValuesTuple& x) {
  return {at<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}
static Cube cube(const CubeTuple& x) { return {at<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }
static Shape shape(const ShapeTuple& x) { return {std::get<0>(x), std::get<1>(x), std::get<2>(x)}; }
static Queue queue(const QueueTuple& x) { return {std::get<0>(x), std::get<1>(x)}; }

static void jump(const ShapeTuple& of, const MatrixTuple& logits, const IndicesTuple& exclude,
                 const IndicesTuple& row_ids, double temperature, int samples, uintptr_t seed_address, uint64_t seed,
                 uintptr_t summaries, uintptr_t target, uintptr_t log_prob, uintptr_t log_escape, uintptr_t first_bad,
                 int64_t first_row, const QueueTuple& where) {
  const bool greedy = temperature == 0.0;
  jump({shape(of), matrix(logits), indices(exclude), indices(row_ids), greedy ? 1.0 : 1.0 / temperature, greedy,
        samples, at<int64_t>(seed_address), seed, at<float>(summaries), at<int64_t>(target), at<float>(log_prob),
        at<float>(log_escape), at<int64_t>(first_bad), first_row},
       queue(where));
}

static void log_prob(const ShapeTuple& of, const MatrixTuple& logits, const IndicesTuple& exclude, double temperature,
                     const TargetsTuple& target, uintptr_t summaries, uintptr_t log_prob, uintptr_t log_escape,
                     const QueueTuple& where) {
  cuda::log_prob({shape(of), matrix(logits), indices(exclude), 1.0 / temperature, targets(target), at<float>(summaries),
                  at<float>(log_prob), at<double>(log_escape)},
                 queue(where));
}

static void log_prob_backward(const ShapeTuple& of, const MatrixTuple& logits, const IndicesTuple& exclude,
                              double temperature, const TargetsTuple& target, const ValuesTuple& upstream,
                              uintptr_t log_escape, uintptr_t target_gradient, const MatrixTuple& gradient,
                              int gradient_dtype, const QueueTuple& where) {
  log_prob_backward(
      {shape(of), matrix(logits), indices(exclude), temperature, 1.0 / temperature, targets(target), values(upstream),
       at<double>(log_escape), at<float>(target_gradient), matrix(gradient), gradient_dtype},
      queue(where));
}

static void rate_ratio(const ShapeTuple& of, const MatrixTuple& logits, const MatrixTuple& base,
                       const IndicesTuple& exclude, const TargetsTuple& target, uintptr_t summaries,
                       uintptr_t log_ratio, uintptr_t escape_gap, const QueueTuple& where) {
  rate_ratio({shape(of), matrix(logits), matrix(base), indices(exclude), targets(target), at<float>(summaries),
              at<float>(log_ratio), at<float>(escape_gap)},
             queue(where));
}

static void matching_loss(const ShapeTuple& of, const MatrixTuple& logits, const MatrixTuple& base,
                          const IndicesTuple& exclude, const TargetsTuple& target, const ValuesTuple& weight,
                          const ValuesTuple& base_weight, const ValuesTuple& row_scale, bool normalized,
                          uintptr_t summaries, uintptr_t target_logit, uintptr_t loss, const MatrixTuple& gradient,
                          int gradient_dtype, uintptr_t shares, const QueueTuple& where) {
  matching_loss({shape(of), matrix(logits), matrix(base), indices(exclude), targets(target), values(weight),
                 values(base_weight), values(row_scale), normalized, at<float>(summaries), at<float>(target_logit),
                 at<double>(loss), matrix(gradient), gradient_dtype, at<float>(shares)},
                queue(where));
}

static void gradient(const ShapeTuple& of, const MatrixTuple& logits, const MatrixTuple& base, int64_t first_column,
                     const IndicesTuple& exclude, const TargetsTuple& target, const ValuesTuple& pull, uintptr_t shares,
                     double temperature, uintptr_t target_gradient, const MatrixTuple& gradient, int gradient_dtype,
                     const QueueTuple& where) {
  cuda::gradient(
      {shape(of), matrix(logits), matrix(base), first_column, indices(exclude), targets(target), values(pull),
       at<float>(shares), 1.0 / temperature, at<float>(target_gradient), matrix(gradient), gradient_dtype},
      queue(where));
}

static void adjoint_weights(int64_t groups, int64_t size, int64_t steps, int dtype, const CubeTuple& log_ratio,
                            const CubeTuple& escape_gap, const ValuesTuple& terminal_cost, double clip,
                            uintptr_t log_weight, uintptr_t weight, uintptr_t log_path, uintptr_t log_normalizer,
                            uintptr_t ess, uintptr_t clipped, uintptr_t first_bad, const QueueTuple& where) {
  adjoint_weights({groups, size, steps, dtype, cube(log_ratio), cube(escape_gap), values(terminal_cost), clip,
                   at<double>(log_weight), at<float>(weight), at<float>(log_path), at<float>(log_normalizer),
                   at<float>(ess), at<float>(clipped), at<int64_t>(first_bad)},
                  queue(where));
}

static void tilt_to_ess(int64_t groups, int64_t size, const ValuesTuple& reward, double ess, double max_tilt,
                        uintptr_t tilt, uintptr_t first_bad, const QueueTuple& where) {
  tilt_to_ess({groups, size, values(reward), ess, max_tilt, at<double>(tilt), at<int64_t>(first_bad)}, queue(where));
}

static void closed_form(const ShapeTuple& of, const MatrixTuple& terminal, int64_t mask_token, double stays,
                        double moves, bool transpose, uintptr_t totals, uintptr_t result, const QueueTuple& where) {
  closed_form({shape(of), matrix(terminal), mask_token, stays, moves, transpose, at<double>(totals), at<float>(result)},
              queue(where));
}

static void walk(int64_t rows, int64_t columns, int64_t length, int64_t inner, bool periodic, uintptr_t taps,
                 const std::vector<double>& few_taps, int64_t radius, const MatrixTuple& source, int source_dtype,
                 uintptr_t result, bool result_is_double, uintptr_t not_finite, const QueueTuple& where) {
  WalkArgs a{rows,
             columns,
             length,
             inner,
             periodic,
             at<double>(taps),
             {},
             radius,
             at<void>(std::get<0>(source)),
             source_dtype,
             std::get<1>(source),
             at<void>(result),
             result_is_double,
             at<int>(not_finite)};
  if (!a.taps) {
    if (radius >= FEW_TAPS || static_cast<int64_t>(few_taps.size()) != radius + 1) {
      throw std::invalid_argument("dam: too many taps to go with a launch");
    }
    std::copy(few_taps.begin(), few_taps.end(), a.few_taps);
  }
  walk(a, queue(where));
}

static void fill_with_nan(int64_t rows, int64_t columns, uintptr_t marked, uintptr_t result, const QueueTuple& where) {
  fill_with_nan({rows, columns, at<int>(marked), at<float>(result)}, queue(where));
}

static void scale(uintptr_t gradient, int dtype, int64_t count, const ValuesTuple& factor, const QueueTuple& where) {
  scale({at<void>(gradient), dtype, count, values(factor)}, queue(where));
}

static void probe_exp(uintptr_t x, uintptr_t result, int64_t count, double scale, const QueueTuple& where) {
  probe_exp(at<float>(x), at<float>(result), count, scale, queue(where));
}
static void probe_exponential(uintptr_t words, uintptr_t result, int64_t count, const QueueTuple& where) {
  probe_exponential(at<uint32_t>(words), at<float>(result), count, queue(where));
}
static void probe_philox(uintptr_t counters, uint64_t key, uintptr_t words, int64_t count, const QueueTuple& where) {
  probe_philox(at<uint32_t>(counters), key, at<uint32_t>(words), count, queue(where));
}

}  // namespace bind
}  // namespace cuda
}  // namespace dam

PYBIND11_MODULE(DAM_MODULE, module) {
  namespace bind = dam::cuda::bind;
  module.doc() =
      "CUDA kernels. A tensor is a tuple of its address (0: absent), its dtype where it may have several, and strides "
      "in "
      "elements; shape is (rows, columns, dtype of the logits), where is (device, stream); dtype is 0 float32, 1 "
      "bfloat16, 2 float16, 3 float64. Nothing is checked here; dam.ops checks. Nothing is allocated and nothing waits "
      "for the device; a kernel that cannot be launched raises RuntimeError.";

  module.def("summary_floats", dam::cuda::summary_floats, "arrays"_a, "rows"_a, "columns"_a,
             "Floats of work memory for `arrays` numbers per tile of each row.");
  module.attr("ROW_SUMMARIES") = dam::cuda::ROW_SUMMARIES;
  module.attr("FEW_TAPS") = dam::cuda::FEW_TAPS;
  module.attr("BASE_SUMMARIES") = dam::cuda::BASE_SUMMARIES;
  module.attr("SHARES") = dam::cuda::SHARES;

  module.def("jump", bind::jump, "shape"_a, "logits"_a, "exclude"_a, "row_ids"_a, "temperature"_a, "samples"_a,
             "seed_address"_a, "seed"_a, "summaries"_a, "target"_a, "log_prob"_a, "log_escape"_a, "first_bad"_a,
             "first_row"_a, "where"_a,
             "Fills target int64 and log_prob float32 [T, samples], log_escape float32 [T]; lowers the int64 at "
             "first_bad to first_row + the first row that cannot be sampled.");
  module.def("log_prob", bind::log_prob, "shape"_a, "logits"_a, "exclude"_a, "temperature"_a, "target"_a, "summaries"_a,
             "log_prob"_a, "log_escape"_a, "where"_a, "Fills log_prob float32 [T, J] and log_escape float64 [T].");
  module.def("log_prob_backward", bind::log_prob_backward, "shape"_a, "logits"_a, "exclude"_a, "temperature"_a,
             "target"_a, "upstream"_a, "log_escape"_a, "target_gradient"_a, "gradient"_a, "gradient_dtype"_a, "where"_a,
             "Fills gradient [T, V]; target_gradient is work memory, float32 [T, J].");
  module.def("rate_ratio", bind::rate_ratio, "shape"_a, "logits"_a, "base"_a, "exclude"_a, "target"_a, "summaries"_a,
             "log_ratio"_a, "escape_gap"_a, "where"_a, "Fills log_ratio float32 [T, J] and escape_gap float32 [T].");
  module.def("matching_loss", bind::matching_loss, "shape"_a, "logits"_a, "base"_a, "exclude"_a, "target"_a, "weight"_a,
             "base_weight"_a, "row_scale"_a, "normalized"_a, "summaries"_a, "target_logit"_a, "loss"_a, "gradient"_a,
             "gradient_dtype"_a, "shares"_a, "where"_a,
             "Fills loss float64 [T], gradient [T, V] and shares float32 [T, SHARES], the last two unless 0; "
             "target_logit is work memory, float32 [T, J].");
  module.def("gradient", bind::gradient, "shape"_a, "logits"_a, "base"_a, "first_column"_a, "exclude"_a, "target"_a,
             "pull"_a, "shares"_a, "temperature"_a, "target_gradient"_a, "gradient"_a, "gradient_dtype"_a, "where"_a,
             "Fills gradient of the logits of some columns, from first_column of the vocabulary on: the share of the "
             "logits less that of the base's, less pull [T, J] at the targets; target_gradient is work memory, float32 "
             "[T, J].");
  module.def(
      "adjoint_weights", bind::adjoint_weights, "groups"_a, "size"_a, "steps"_a, "dtype"_a, "log_ratio"_a,
      "escape_gap"_a, "terminal_cost"_a, "clip"_a, "log_weight"_a, "weight"_a, "log_path"_a, "log_normalizer"_a,
      "ess"_a, "clipped"_a, "first_bad"_a, "where"_a,
      "Fills weight [G, K], log_path [G, K, S + 1], log_normalizer, ess and clipped [G], all float32; log_weight "
      "is work memory, float64 [G, K]; lowers the int64 at first_bad to the first trajectory, as g K + k, that no "
      "weight can be given to.");
  module.def("tilt_to_ess", bind::tilt_to_ess, "groups"_a, "size"_a, "reward"_a, "ess"_a, "max_tilt"_a, "tilt"_a,
             "first_bad"_a, "where"_a,
             "Fills tilt float64 [G]; lowers the int64 at first_bad to the first reward, as g K + k, that is NaN or "
             "+inf.");
  module.def("closed_form", bind::closed_form, "shape"_a, "terminal"_a, "mask_token"_a, "stays"_a, "moves"_a,
             "transpose"_a, "totals"_a, "result"_a, "where"_a,
             "Fills result float32 [B, V]; mask_token -1 is the uniform chain; totals is work memory, float64 [B, "
             "tiles of 1024].");
  module.def(
      "walk", bind::walk, "rows"_a, "columns"_a, "length"_a, "inner"_a, "periodic"_a, "taps"_a, "few_taps"_a,
      "radius"_a, "source"_a, "source_dtype"_a, "result"_a, "result_is_double"_a, "not_finite"_a, "where"_a,
      "Fills result [B, V] and sets the int32 [B] at not_finite to 1 for rows that hold something not finite; taps "
      "is float64 [radius + 1].");
  module.def("fill_with_nan", bind::fill_with_nan, "rows"_a, "columns"_a, "marked"_a, "result"_a, "where"_a,
             "Fills the marked rows of result float32 [rows, columns] with NaN.");

  module.def("scale", bind::scale, "gradient"_a, "dtype"_a, "count"_a, "factor"_a, "where"_a,
             "Multiplies a contiguous gradient by the number at factor, in place; by 1 without reading it.");

  module.def("probe_exp", bind::probe_exp, "x"_a, "result"_a, "count"_a, "scale"_a, "where"_a);
  module.def("probe_exponential", bind::probe_exponential, "words"_a, "result"_a, "count"_a, "where"_a);
  module.def("probe_philox", bind::probe_philox, "counters"_a, "key"_a, "words"_a, "count"_a, "where"_a);

  module.def(
      "plan_rows",
      [](int64_t rows, int64_t columns, int64_t row_bytes, bool reread, int blocks_per_multiprocessor,
         int multiprocessors, int64_t l2_bytes, bool clusters) {
        const auto plan = dam::cuda::plan_rows(rows, columns, row_bytes, reread, blocks_per_multiprocessor,
                                               {multiprocessors, l2_bytes, clusters});
        return py::dict("tiles"_a = plan.tiles, "team_warps"_a = plan.team_warps, "splits"_a = plan.splits,
                        "split_tiles"_a = plan.split_tiles, "clustered"_a = plan.clustered, "blocks"_a = plan.blocks);
      },
      "rows"_a, "columns"_a, "row_bytes"_a, "reread"_a, "blocks_per_multiprocessor"_a, "multiprocessors"_a,
      "l2_bytes"_a, "clusters"_a, "How a launch over rows is divided on a chip.");
#if defined(DAM_EMULATE)
  module.def(
      "pretend",
      [](int multiprocessors, int64_t l2_bytes, bool clusters, uint64_t order) {
        dam::emulator::pretend({multiprocessors, l2_bytes, clusters}, order);
      },
      "multiprocessors"_a = 4, "l2_bytes"_a = int64_t{8} << 20, "clusters"_a = true, "order"_a = 0,
      "What the emulated chip is like, and in which order it runs threads: 0 in turn, others at random.");
#endif
}
