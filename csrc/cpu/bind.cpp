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

#include "../python/arguments.h"
#include "kernels.h"
#include "look.h"
#include "pages.h"

namespace dam {

#if defined(DAM_HAVE_X86)
#define DAM_SET avx512
#include "isa.def"
#define DAM_SET avx2
#include "isa.def"
#endif
#define DAM_SET plain
#include "isa.def"

#if defined(DAM_HAVE_BFLOAT16)
namespace avx512_bf16 {
bool tiles_allowed();
}
#endif

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
  all.push_back({"avx512", avx512, tables::avx512()});
  all.push_back({"avx2", avx2, tables::avx2()});
#endif
  all.push_back({"plain", true, tables::plain()});
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

// What this machine multiplies bfloat16 with, under the set in use, best first: names, and their numbers for `product`.
static std::vector<std::pair<std::string, int>> instructions() {
  std::vector<std::pair<std::string, int>> all;
#if defined(DAM_HAVE_BFLOAT16)
  if (chosen().name == std::string("avx512")) {
    if (__builtin_cpu_supports("amx-bf16") && avx512_bf16::tiles_allowed()) all.emplace_back("amx", TILES);
    if (__builtin_cpu_supports("avx512bf16")) all.emplace_back("avx512_bf16", PAIRS);
  }
#endif
  all.emplace_back("float32", WIDENED);
  return all;
}

namespace bind {

namespace py = pybind11;
using python::integer;
using python::take;

template <class T>
static T* at(uintptr_t x) {
  return reinterpret_cast<T*>(x);
}

static void take(PyObject* x, Shape& member) {
  const auto item = [&](int i) { return integer(python::item(x, i, 4)); };
  member = {item(0), item(1), static_cast<int>(item(2)), static_cast<int>(item(3))};
}

// An output that is about to be filled. glibc's malloc maps memory anew for an array of 32 MB and more, and for smaller
// ones after it gave some back; in pages of 4 KB the faults of the first touch then take several times as long as the
// kernel, so pages of 2 MB are asked for, where they do not go back to a host as soon as they are free.
static void advise(const void* array, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = uintptr_t{1} << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(array);
  static const bool scarce = memory_goes_back();
  if (array && bytes >= 2 * static_cast<int64_t>(PAGE) && !scarce) {
    const uintptr_t begin = (address + PAGE - 1) / PAGE * PAGE, end = (address + bytes) / PAGE * PAGE;
    madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);  // advice: where it is refused, small pages serve
  }
#endif
  (void)array, (void)bytes;
}

// What a kernel returns, as Python has it; nothing of one that returns nothing.
template <class Result, class Args>
static py::object result_of(Result (*kernel)(const Args&), const Args& a) {
  if constexpr (std::is_void_v<Result>) {
    const py::gil_scoped_release release;
    kernel(a);
    return py::object();
  } else {
    Result result;
    {
      const py::gil_scoped_release release;
      result = kernel(a);
    }
    return py::reinterpret_steal<py::object>(PyLong_FromLongLong(result));
  }
}

// What `body` returns, or null with its error set; None where it finds something unfit.
template <class Body>
static PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const look::Unfit&) {
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The ops; their keyword arguments are the members of ops.def that Python gives. Functions of Python's own interface, as
// pybind11 puts a microsecond around each of its own.
namespace functions {
#define TAKES(type, name) take(call[DAM_NAME(name)], a.name);
#define ROWS(shape, name) looked.rows(call[DAM_NAME(name)], a.shape, a.name);
#define TARGETS(name, count) looked.targets(call[DAM_NAME(name)], a.name, a.count);
#define LOOKS(type, name, as) looked.as(call[DAM_NAME(name)], a.name);
#define MAKES(type, name, sizes) a.name = looked.make<type>(sizes);
#define READS(type, name) take(call[DAM_NAME(name)], a.name);
#define FILLS(type, name) take(call[DAM_NAME(name)], a.name);
#define FILLS_LARGE(type, name, bytes) \
  take(call[DAM_NAME(name)], a.name);  \
  advise(a.name, bytes);
#define KNOWN(type, name, value) a.name = value;
#define WORK(type, name, count)                                   \
  const std::unique_ptr<type[]> name##_memory(new type[count]()); \
  a.name = name##_memory.get();
#define SCRATCH(name)                                                                                          \
  a.name.length = scratch_length(a.shape.columns);                                                             \
  const std::unique_ptr<double[]> name##_memory(new double[a.shape.threads * SCRATCH_ARRAYS * a.name.length]); \
  a.name.data = name##_memory.get();
#define OP(name, Name, result, does, members)                                                            \
  static PyObject* name(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {    \
    return guarded([&] {                                                                                 \
      const Kernels& kernels = chosen().kernels;                                                         \
      python::Call call(#name, values, positional, names);                                               \
      [[maybe_unused]] look::Call looked;                                                                \
      Name##Args a{};                                                                                    \
      members;                                                                                           \
      call.finish();                                                                                     \
      return looked.results(result_of(kernels.name, a));                                                 \
    });                                                                                                  \
  }
#include "ops.def"
}  // namespace functions

static PyObject* ordinary(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] { return PyLong_FromLong(look::ordinary(arguments, count)); });
}

static PyObject* takes_head(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    look::require(count == 3);
    return PyBool_FromLong(look::takes_head(arguments[0], arguments[1], arguments[2]));
  });
}

template <class Function>
static PyMethodDef method(const char* name, Function* function, int flags, const char* does) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), flags, does};
}

static void add_functions(py::module_& module) {
#define OP(name, Name, result, does, members) method(#name, functions::name, METH_FASTCALL | METH_KEYWORDS, does),
  static PyMethodDef all[] = {
#include "ops.def"
      method("ordinary", ordinary, METH_FASTCALL,
             "ordinary(*arguments): whether torch's dispatcher would do nothing with a call of an op but call its "
             "function: 1; 2: but record it for a gradient; 0: no. None: an argument cannot be looked at."),
      method("takes_head", takes_head, METH_FASTCALL,
             "takes_head(hidden, weight, bias): whether these are hidden states [T, D], a head [V, D] and None or [V], "
             "of one dtype that the kernels take and unit inner stride, with few logits, and no variable asks for other "
             "ways; None: one does not fit."),
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(module.ptr(), all) != 0) throw py::error_already_set();
}

}  // namespace bind
}  // namespace dam

PYBIND11_MODULE(_cpu, module) {
  namespace py = pybind11;
  using namespace py::literals;
  module.doc() =
      "C++ kernels on the CPU. The ops take keyword arguments, the members that csrc/cpu/ops.def lists. Those that "
      "take logits as a tensor look at it and the others, return new tensors, and None where one does not fit. To others "
      "arrays are addresses, or tuples of an address (0: absent) and strides in elements; shape is (rows, columns, "
      "dtype, threads), dtype is 0 float32, 1 bfloat16, 2 float16. These check nothing; dam.ops checks.";

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

  dam::look::torch = new dam::look::Torch;
  dam::bind::add_functions(module);
  module.def(
      "watch",
      [](py::object keys_of, py::object keys_of_thread, py::object function_modes, py::object profiled,
         py::object forward_ad, std::vector<uint64_t> plain, std::vector<uint64_t> no_modes) {
        dam::look::watch = {keys_of.release().ptr(),    keys_of_thread.release().ptr(), function_modes.release().ptr(),
                            profiled.release().ptr(),   forward_ad.release().ptr(),     std::move(plain),
                            std::move(no_modes)};
      },
      "keys_of"_a, "keys_of_thread"_a, "function_modes"_a, "profiled"_a, "forward_ad"_a, "plain"_a, "no_modes"_a,
      "Tells `ordinary` where torch keeps what it looks at, and which keys of a tensor and of a thread are ordinary.");

  module.attr("BUILD") = DAM_BUILD;
  module.def(
      "advise", [](uintptr_t array, int64_t bytes) { dam::bind::advise(dam::bind::at<void>(array), bytes); }, "array"_a,
      "bytes"_a, "Asks for large pages for an array that is about to be filled.");

  module.def("instructions", &dam::instructions,
             "Pairs of name and number: the instructions that `product` can multiply bfloat16 with here, best first.");

  module.def("memory_goes_back", &dam::memory_goes_back, "devices"_a = dam::VIRTIO_DEVICES,
             "Whether this machine's free memory goes back to a host, by the balloon device in that folder.");

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
      [](uintptr_t x, uintptr_t result, int64_t count, double scale) {
        dam::chosen().kernels.exp(dam::bind::at<float>(x), dam::bind::at<float>(result), count, scale);
      },
      "x"_a, "result"_a, "count"_a, "scale"_a, "exp(scale * x) of float32 x, as the kernels compute it.");
  module.def(
      "exponential",
      [](uintptr_t words, uintptr_t result, int64_t count) {
        dam::chosen().kernels.exponential(dam::bind::at<uint32_t>(words), dam::bind::at<double>(result), count);
      },
      "words"_a, "result"_a, "count"_a, "Standard exponentials, float64, from uint32 [count, 2] random words.");
  module.def(
      "read",
      [](uintptr_t data, int64_t count, int threads) {
        const py::gil_scoped_release release;
        return dam::chosen().kernels.read(dam::bind::at<uint64_t>(data), count, threads);
      },
      "data"_a, "count"_a, "threads"_a, "Wrapping sum of `count` 64-bit words: the time of a plain read.");
}
