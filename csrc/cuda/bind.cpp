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
#include "../python/arguments.h"
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

using QueueTuple = std::tuple<int, uintptr_t>;  // device, stream

template <class T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
static Queue queue(const QueueTuple& x) { return {std::get<0>(x), std::get<1>(x)}; }

using python::address;
using python::integer;
using python::item;
using python::take;

static void take(PyObject* x, Shape& member) {
  member = {integer(item(x, 0, 3)), integer(item(x, 1, 3)), static_cast<int>(integer(item(x, 2, 3)))};
}
static void take(PyObject* x, Targets& member) {
  member = {address<int64_t>(item(x, 0, 4)), integer(item(x, 1, 4)), integer(item(x, 2, 4)), integer(item(x, 3, 4))};
}
static void take(PyObject* x, Values& member) {
  member = {address<void>(item(x, 0, 4)), static_cast<int>(integer(item(x, 1, 4))), integer(item(x, 2, 4)),
            integer(item(x, 3, 4))};
}
static void take(PyObject* x, Queue& member) {
  member = {static_cast<int>(integer(item(x, 0, 2))), reinterpret_cast<uintptr_t>(address<void>(item(x, 1, 2)))};
}
static void take(PyObject* x, FewTaps& member) {
  const auto taps = py::cast<std::vector<double>>(py::handle(x));
  if (static_cast<int64_t>(taps.size()) > FEW_TAPS) throw std::invalid_argument("dam: too many taps for a launch");
  std::copy(taps.begin(), taps.end(), member.weights);
  member.count = static_cast<int64_t>(taps.size());
}

// The ops; their keyword arguments are the members of ops.def and `where`, device and stream.
static void add_ops(py::module_& module) {
#define TAKES(type, name) take(call[DAM_NAME(name)], a.name);
#define READS(type, name) take(call[DAM_NAME(name)], a.name);
#define FILLS(type, name) take(call[DAM_NAME(name)], a.name);
#define CHOSEN(type, name)
#define OP(name, Name, does, members)        \
  module.def(                                \
      #name,                                 \
      [](const py::kwargs& arguments) {      \
        python::Call call(#name, arguments); \
        Name##Args a{};                      \
        Queue where{};                       \
        members;                             \
        take(call[DAM_NAME(where)], where);  \
        call.finish();                       \
        cuda::name(a, where);                \
      },                                     \
      does);
#include "ops.def"
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
      "CUDA kernels. The ops take keyword arguments, the members that csrc/cuda/ops.def lists and where, (device, "
      "stream). A tensor is an address, or a tuple of its address (0: absent), its dtype where it may have several, "
      "and strides in elements; shape is (rows, columns, dtype of the logits); dtype is 0 float32, 1 bfloat16, 2 "
      "float16, 3 float64. Nothing is checked here; dam.ops checks. Nothing is allocated and nothing waits for the "
      "device; a kernel that cannot be launched raises RuntimeError.";

  module.def("summary_floats", dam::cuda::summary_floats, "arrays"_a, "rows"_a, "columns"_a,
             "Floats of work memory for `arrays` numbers per tile of each row.");
  module.attr("ROW_SUMMARIES") = dam::cuda::ROW_SUMMARIES;
  module.attr("FEW_TAPS") = dam::cuda::FEW_TAPS;
  module.attr("BASE_SUMMARIES") = dam::cuda::BASE_SUMMARIES;
  module.attr("SHARES") = dam::cuda::SHARES;

  bind::add_ops(module);

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
