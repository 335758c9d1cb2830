// Python module dam._cpu: the kernels of the best instruction set this machine has, over addresses and sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../core/dtype.h"
#include "kernels.h"

namespace dam {

#if defined(DAM_HAVE_X86)
DAM_DECLARE_KERNELS(avx512)
DAM_DECLARE_KERNELS(avx2)
#endif
DAM_DECLARE_KERNELS(plain)

#define DAM_KERNELS(ISA)                                                                \
  {ISA::jump,         ISA::log_prob,        ISA::log_prob_backward, ISA::matching_loss, \
   ISA::rate_ratio,   ISA::adjoint_weights, ISA::tilt_to_ess,       ISA::closed_form,   \
   ISA::filter_lines, ISA::probe_exp,       ISA::probe_exponential, ISA::probe_philox,  \
   ISA::probe_read}

struct Set {
  const char* name;
  bool present;
  Kernels kernels;
};

static std::vector<Set> sets() {
  std::vector<Set> all;
#if defined(DAM_HAVE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  all.push_back({"avx512", avx512, DAM_KERNELS(avx512)});
  all.push_back({"avx2", avx2, DAM_KERNELS(avx2)});
#endif
  all.push_back({"plain", true, DAM_KERNELS(plain)});
  return all;
}

static Set choose() {
  const char* wanted = std::getenv("DAM_CPU_ISA");
  std::string names;
  for (const Set& set : sets()) {
    if (wanted && *wanted) {
      if (set.name == std::string(wanted)) {
        if (set.present) return set;
        throw std::runtime_error(std::string("DAM_CPU_ISA=") + wanted +
                                 ": this machine does not have these instructions");
      }
    } else if (set.present) {
      return set;
    }
    names += names.empty() ? set.name : std::string(", ") + set.name;
  }
  throw std::runtime_error(std::string("DAM_CPU_ISA must be one of ") + names + "; got " + wanted);
}

// On first use rather than on import, so that a wrong DAM_CPU_ISA is an error where an op runs. A failed choice is made
// again the next time.
static const Set& chosen() {
  static const Set set = choose();
  return set;
}

namespace bind {

using Address = uintptr_t;

template <class T>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

constexpr int64_t LARGE = int64_t{32} << 20;

// The address of an output that is about to be filled. From 32 MB on glibc's malloc maps memory anew for every array;
// in pages of 4 KB the faults of the first touch then take several times as long as the kernel, so pages of 2 MB are
// asked for. Only where threads fill it one stretch each: those of a matmul would wait for each other's pages.
static void* output(Address address, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr Address PAGE = Address{1} << 21;
  if (address && bytes >= LARGE) {
    const Address begin = (address + PAGE - 1) / PAGE * PAGE, end = (address + bytes) / PAGE * PAGE;
    madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);  // advice: where it is refused, small pages serve
  }
#endif
  (void)bytes;
  return at<void>(address);
}

static int64_t matrix_bytes(int64_t rows, int64_t columns, int dtype) {
  return rows * columns * (dtype == static_cast<int>(Dtype::float32) ? 4 : 2);
}

class ScratchMemory {
 public:
  ScratchMemory(int64_t columns, int threads)
      : length_((columns / 1024 + 1 + 7) / 8 * 8), data_(new double[threads * SCRATCH_ARRAYS * length_]) {}
  Scratch get() const { return {data_.get(), length_}; }

 private:
  int64_t length_;
  std::unique_ptr<double[]> data_;
};

static int64_t jump(Address logits, int64_t rows, int64_t columns, int64_t row_stride, int dtype, Address exclude,
                    int64_t exclude_stride, Address row_ids, int64_t row_ids_stride, double temperature,
                    int64_t num_samples, uint64_t seed, Address target, Address log_prob, Address log_escape,
                    int threads) {
  const Kernels& kernels = chosen().kernels;
  const pybind11::gil_scoped_release release;
  const ScratchMemory scratch(columns, threads);
  return kernels.jump({{rows, columns, dtype, threads},
                       scratch.get(),
                       {at<void>(logits), row_stride},
                       {at<int64_t>(exclude), exclude_stride},
                       {at<int64_t>(row_ids), row_ids_stride},
                       temperature,
                       num_samples,
                       seed,
                       at<int64_t>(target),
                       at<float>(log_prob),
                       at<float>(log_escape)});
}

static void log_prob(Address logits, int64_t rows, int64_t columns, int64_t row_stride, int dtype, Address exclude,
                     int64_t exclude_stride, double temperature, Address target, int64_t targets, Address log_prob,
                     Address log_escape, int threads) {
  const Kernels& kernels = chosen().kernels;
  const pybind11::gil_scoped_release release;
  const ScratchMemory scratch(columns, threads);
  kernels.log_prob({{rows, columns, dtype, threads},
                    scratch.get(),
                    {at<void>(logits), row_stride},
                    {at<int64_t>(exclude), exclude_stride},
                    temperature,
                    at<int64_t>(target),
                    targets,
                    at<float>(log_prob),
                    at<double>(log_escape)});
}

static void log_prob_backward(Address logits, int64_t rows, int64_t columns, int64_t row_stride, int dtype,
                              Address exclude, int64_t exclude_stride, double temperature, Address target,
                              int64_t targets, Address upstream, Address log_escape, Address gradient, int threads) {
  const Kernels& kernels = chosen().kernels;
  const pybind11::gil_scoped_release release;
  kernels.log_prob_backward({{rows, columns, dtype, threads},
                             {at<void>(logits), row_stride},
                             {at<int64_t>(exclude), exclude_stride},
                             temperature,
                             at<int64_t>(target),
                             targets,
                             at<double>(upstream),
                             at<double>(log_escape),
                             output(gradient, matrix_bytes(rows, columns, dtype))});
}

static double matching_loss(Address logits, int64_t rows, int64_t columns, int64_t row_stride, int dtype, Address base,
                            int64_t base_row_stride, Address exclude, int64_t exclude_stride, Address target,
                            int64_t targets, Address weight, Address base_weight, Address row_scale, bool normalized,
                            Address gradient, int threads) {
  const Kernels& kernels = chosen().kernels;
  const pybind11::gil_scoped_release release;
  const ScratchMemory scratch(columns, threads);
  std::vector<double> loss(rows);
  kernels.matching_loss({{rows, columns, dtype, threads},
                         scratch.get(),
                         {at<void>(logits), row_stride},
                         {at<void>(base), base_row_stride},
                         {at<int64_t>(exclude), exclude_stride},
                         at<int64_t>(target),
                         targets,
                         at<double>(weight),
                         at<double>(base_weight),
                         at<double>(row_scale),
                         normalized,
                         loss.data(),
                         output(gradient, matrix_bytes(rows, columns, dtype))});
  // In the rows' order, so that the loss does not depend on the number of threads.
  double total = 0.0;
  for (const double term : loss) total += term;
  return total;
}

static void rate_ratio(Address logits, int64_t rows, int64_t columns, int64_t row_stride, int dtype, Address base,
                       int64_t base_row_stride, Address exclude, int64_t exclude_stride, Address target,
                       int64_t targets, Address log_ratio, Address escape_gap, int threads) {
  const Kernels& kernels = chosen().kernels;
  const pybind11::gil_scoped_release release;
  const ScratchMemory scratch(columns, threads);
  kernels.rate_ratio({{rows, columns, dtype, threads},
                      scratch.get(),
                      {at<void>(logits), row_stride},
                      {at<void>(base), base_row_stride},
                      {at<int64_t>(exclude), exclude_stride},
                      at<int64_t>(target),
                      targets,
                      at<float>(log_ratio),
                      at<float>(escape_gap)});
}

static int64_t adjoint_weights(Address log_ratio, int64_t groups, int64_t size, int64_t steps, int64_t group_stride,
                               int64_t row_stride, int dtype, Address escape_gap, int64_t gap_group_stride,
                               int64_t gap_row_stride, Address terminal_cost, double clip, Address weight,
                               Address log_path, Address log_normalizer, Address ess, Address clipped, int threads) {
  const Kernels& kernels = chosen().kernels;
  const pybind11::gil_scoped_release release;
  const std::unique_ptr<double[]> scratch(new double[threads * size]);
  const int64_t path_bytes = groups * size * (steps + 1) * 4;
  return kernels.adjoint_weights({groups,
                                  size,
                                  steps,
                                  dtype,
                                  threads,
                                  scratch.get(),
                                  {at<void>(log_ratio), group_stride, row_stride},
                                  {at<void>(escape_gap), gap_group_stride, gap_row_stride},
                                  at<double>(terminal_cost),
                                  clip,
                                  path_bytes >= LARGE,
                                  at<float>(weight),
                                  static_cast<float*>(output(log_path, path_bytes)),
                                  at<float>(log_normalizer),
                                  at<float>(ess),
                                  at<float>(clipped)});
}

static int64_t tilt_to_ess(Address reward, int64_t groups, int64_t size, double ess, double max_tilt, Address tilt,
                           int threads) {
  const Kernels& kernels = chosen().kernels;
  const pybind11::gil_scoped_release release;
  const int64_t length = (size + 7) / 8 * 8;
  const std::unique_ptr<double[]> scratch(new double[threads * length]);
  return kernels.tilt_to_ess(
      {groups, size, threads, scratch.get(), length, at<double>(reward), ess, max_tilt, at<double>(tilt)});
}

static void closed_form(Address terminal, int64_t rows, int64_t columns, int64_t row_stride, int dtype,
                        int64_t mask_token, double stays, double moves, bool transpose, Address result, int threads) {
  const Kernels& kernels = chosen().kernels;
  const pybind11::gil_scoped_release release;
  const ScratchMemory scratch(columns, threads);
  kernels.closed_form({{rows, columns, dtype, threads},
                       scratch.get(),
                       {at<void>(terminal), row_stride},
                       mask_token,
                       stays,
                       moves,
                       transpose,
                       static_cast<float*>(output(result, rows * columns * 4))});
}

static void filter_lines(Address source, int64_t outer, int64_t length, int64_t inner, bool periodic,
                         const std::vector<double>& taps, Address result, int threads) {
  const Kernels& kernels = chosen().kernels;
  const pybind11::gil_scoped_release release;
  const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
  // Zeroed, as the kernel computes on its padding.
  std::vector<double> scratch(threads * filter_scratch(radius));
  kernels.filter_lines({outer, length, inner, periodic, taps.data(), radius, at<double>(source), at<double>(result),
                        threads, scratch.data()});
}

}  // namespace bind
}  // namespace dam

PYBIND11_MODULE(_cpu, module) {
  namespace py = pybind11;
  using namespace py::literals;
  module.doc() =
      "C++ kernels on the CPU. Addresses are integers (0: absent), strides count elements, dtype is 0 float32, "
      "1 bfloat16, 2 float16. Nothing is checked here; dam.ops checks.";

  module.def("isa", [] { return dam::chosen().name; }, "Name of the instruction set in use.");
  module.def(
      "isas",
      [] {
        py::list names;
        for (const auto& set : dam::sets()) {
          if (set.present) names.append(set.name);
        }
        return names;
      },
      "Names of the instruction sets this machine can run, best first; DAM_CPU_ISA picks one.");

  module.def("jump", dam::bind::jump, "logits"_a, "rows"_a, "columns"_a, "row_stride"_a, "dtype"_a, "exclude"_a,
             "exclude_stride"_a, "row_ids"_a, "row_ids_stride"_a, "temperature"_a, "num_samples"_a, "seed"_a,
             "target"_a, "log_prob"_a, "log_escape"_a, "threads"_a,
             "Fills target int64 and log_prob float32 [T, num_samples], log_escape float32 [T]; returns the first row "
             "that cannot be sampled, or -1.");
  module.def("log_prob", dam::bind::log_prob, "logits"_a, "rows"_a, "columns"_a, "row_stride"_a, "dtype"_a, "exclude"_a,
             "exclude_stride"_a, "temperature"_a, "target"_a, "targets"_a, "log_prob"_a, "log_escape"_a, "threads"_a,
             "Fills log_prob float32 [T, J] and log_escape float64 [T].");
  module.def("log_prob_backward", dam::bind::log_prob_backward, "logits"_a, "rows"_a, "columns"_a, "row_stride"_a,
             "dtype"_a, "exclude"_a, "exclude_stride"_a, "temperature"_a, "target"_a, "targets"_a, "upstream"_a,
             "log_escape"_a, "gradient"_a, "threads"_a,
             "Fills gradient [T, V]; upstream is float64 [T, J], log_escape float64 [T].");
  module.def(
      "matching_loss", dam::bind::matching_loss, "logits"_a, "rows"_a, "columns"_a, "row_stride"_a, "dtype"_a, "base"_a,
      "base_row_stride"_a, "exclude"_a, "exclude_stride"_a, "target"_a, "targets"_a, "weight"_a, "base_weight"_a,
      "row_scale"_a, "normalized"_a, "gradient"_a, "threads"_a,
      "Returns the loss and fills gradient [T, V]; weight is float64 [T, J], base_weight and row_scale float64 [T].");

  module.def("rate_ratio", dam::bind::rate_ratio, "logits"_a, "rows"_a, "columns"_a, "row_stride"_a, "dtype"_a,
             "base"_a, "base_row_stride"_a, "exclude"_a, "exclude_stride"_a, "target"_a, "targets"_a, "log_ratio"_a,
             "escape_gap"_a, "threads"_a, "Fills log_ratio float32 [T, J] and escape_gap float32 [T].");
  module.def(
      "adjoint_weights", dam::bind::adjoint_weights, "log_ratio"_a, "groups"_a, "size"_a, "steps"_a, "group_stride"_a,
      "row_stride"_a, "dtype"_a, "escape_gap"_a, "gap_group_stride"_a, "gap_row_stride"_a, "terminal_cost"_a, "clip"_a,
      "weight"_a, "log_path"_a, "log_normalizer"_a, "ess"_a, "clipped"_a, "threads"_a,
      "Fills float32 weight [G, K], log_path [G, K, S + 1], log_normalizer, ess and clipped [G]; terminal_cost is "
      "float64 [G, K]. Returns the first trajectory, as g * K + k, that has no weight, or -1.");
  module.def("tilt_to_ess", dam::bind::tilt_to_ess, "reward"_a, "groups"_a, "size"_a, "ess"_a, "max_tilt"_a, "tilt"_a,
             "threads"_a,
             "Fills tilt float64 [G]; reward is float64 [G, K]. Returns the first reward, as g * K + k, that is NaN or "
             "+inf, or -1.");
  module.def("closed_form", dam::bind::closed_form, "terminal"_a, "rows"_a, "columns"_a, "row_stride"_a, "dtype"_a,
             "mask_token"_a, "stays"_a, "moves"_a, "transpose"_a, "result"_a, "threads"_a,
             "Fills result float32 [B, V] with backward_kolmogorov of Absorbing, or of Uniform for mask_token -1.");
  module.def("filter_lines", dam::bind::filter_lines, "source"_a, "outer"_a, "length"_a, "inner"_a, "periodic"_a,
             "taps"_a, "result"_a, "threads"_a,
             "Fills result with source filtered along its middle dimension, both float64 [outer, length, inner]; taps "
             "is a list of floats, the middle one first.");

  module.def(
      "philox",
      [](const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
        if (counter.size() != 4 || key.size() != 2) throw std::invalid_argument("philox: 4 counter words, 2 key words");
        uint32_t words[4];
        dam::chosen().kernels.philox(counter.data(), key.data(), words);
        return py::make_tuple(words[0], words[1], words[2], words[3]);
      },
      "counter"_a, "key"_a, "The four words of Philox 4x32-10.");
  module.def(
      "exp",
      [](dam::bind::Address x, dam::bind::Address result, int64_t count, double scale) {
        dam::chosen().kernels.exp(dam::bind::at<float>(x), dam::bind::at<float>(result), count, scale);
      },
      "x"_a, "result"_a, "count"_a, "scale"_a, "exp(scale * x) of float32 x, as the kernels compute it.");
  module.def(
      "exponential",
      [](dam::bind::Address words, dam::bind::Address result, int64_t count) {
        dam::chosen().kernels.exponential(dam::bind::at<uint32_t>(words), dam::bind::at<double>(result), count);
      },
      "words"_a, "result"_a, "count"_a, "Standard exponentials, float64, from uint32 [count, 2] random words.");
  module.def(
      "read",
      [](dam::bind::Address data, int64_t count, int threads) {
        const py::gil_scoped_release release;
        return dam::chosen().kernels.read(dam::bind::at<uint64_t>(data), count, threads);
      },
      "data"_a, "count"_a, "threads"_a, "Wrapping sum of `count` 64-bit words: the time of a plain read.");
}
