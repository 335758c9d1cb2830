// How dam._cpu looks at torch's tensors and makes new ones: by Python's interface, so that it is built without torch
// and for every release of it. What is not such as a kernel takes it is Unfit; what is wrong with it dam.ops says.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "../python/arguments.h"
#include "kernels.h"

namespace dam {
namespace look {

namespace py = pybind11;

struct Unfit {};

inline void require(bool fits) {
  if (!fits) throw Unfit{};
}

// A reference from Python, or Unfit in the place of its error.
inline py::object found(PyObject* x) {
  if (!x) {
    PyErr_Clear();
    throw Unfit{};
  }
  return py::reinterpret_steal<py::object>(x);
}

// torch's own objects, which live as long as the process.
struct Torch {
  PyObject *float32, *bfloat16, *float16, *float64, *int64, *boolean, *tensor, *parameter, *threads, *grad_enabled;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto get = [&](const char* name) { return py::object(torch.attr(name)).release().ptr(); };
    float32 = get("float32"), bfloat16 = get("bfloat16"), float16 = get("float16"), float64 = get("float64");
    int64 = get("int64"), boolean = get("bool"), tensor = get("Tensor");
    threads = get("get_num_threads"), grad_enabled = get("is_grad_enabled");
    parameter = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
  }
};
// Made when the module is: a static of a function would be locked while Python imports.
inline const Torch* torch = nullptr;

inline py::object call(PyObject* function) { return found(PyObject_CallNoArgs(function)); }
inline py::object method(PyObject* x, PyObject* name) { return found(PyObject_CallMethodNoArgs(x, name)); }
inline py::object attribute(PyObject* x, PyObject* name) { return found(PyObject_GetAttr(x, name)); }

inline bool is_int(PyObject* x) { return PyLong_Check(x) && !PyBool_Check(x); }

inline int64_t whole(PyObject* x) {
  require(is_int(x));
  const long long value = PyLong_AsLongLong(x);
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw Unfit{};
  }
  return value;
}

using Sizes = std::vector<int64_t>;

struct Array {
  void* data;
  PyObject* dtype;
  Sizes sizes, strides;

  explicit Array(PyObject* x)
      : sizes(numbers(attribute(x, DAM_NAME(shape)))), strides(numbers(method(x, DAM_NAME(stride)))) {
    require(sizes.size() == strides.size());
    dtype = attribute(x, DAM_NAME(dtype)).ptr();  // one of the objects above, or of others that live as long
    data = reinterpret_cast<void*>(whole(method(x, DAM_NAME(data_ptr)).ptr()));
  }

  // Entries of the first dimensions, and how far one is from the next; Unfit where that varies.
  struct Run {
    int64_t count, stride;
  };
  Run run(size_t dimensions) const {
    Run found{1, 0};
    for (size_t i = dimensions; i-- > 0;) {
      if (sizes[i] == 1) continue;
      require(found.count <= 1 || strides[i] == found.stride * found.count);
      if (found.count == 1) found.stride = strides[i];
      found.count *= sizes[i];
    }
    return found;
  }

  // Rows of at least one number, each beside the next.
  bool has_rows() const { return !sizes.empty() && sizes.back() >= 1 && (strides.back() == 1 || sizes.back() == 1); }

 private:
  static Sizes numbers(const py::object& x) {
    require(PyTuple_Check(x.ptr()));
    Sizes all(PyTuple_GET_SIZE(x.ptr()));
    for (size_t i = 0; i < all.size(); ++i) all[i] = whole(PyTuple_GET_ITEM(x.ptr(), i));
    return all;
  }
};

inline int code_of(PyObject* dtype) {  // of core/dtype.h, or -1
  return dtype == torch->float32 ? 0 : dtype == torch->bfloat16 ? 1 : dtype == torch->float16 ? 2 : -1;
}

// The arguments of one call that ops.def says are looked at, and the arrays that are made for it.
class Call {
 public:
  void rows(PyObject* x, Shape& shape, Matrix& member) {
    const Array array(x);
    const int dtype = code_of(array.dtype);
    require(array.has_rows() && dtype >= 0);
    const Array::Run run = array.run(array.sizes.size() - 1);
    shape = {run.count, array.sizes.back(), dtype, static_cast<int>(whole(call(torch->threads).ptr()))};
    member = {array.data, run.stride};
    like_ = x, dtype_ = array.dtype, shape_ = shape;
    of_rows = Sizes(array.sizes.begin(), array.sizes.end() - 1);
  }
  void like(PyObject* x, Matrix& member) {
    const Array array(x);
    require(array.has_rows() && array.dtype == dtype_ && array.sizes == followed_by(shape_.columns));
    member = {array.data, array.run(of_rows.size()).stride};
  }
  void per_row(PyObject* x, Indices& member) {
    member = {nullptr, 0};
    if (x == Py_None) return;
    const Array array(x);
    require(array.dtype == torch->int64 && array.sizes == of_rows);
    member = {static_cast<const int64_t*>(array.data), array.run(of_rows.size()).stride};
  }
  // Of each row, or of all: a column, or -1 for none.
  void column(PyObject* x, Indices& member) {
    if (!is_int(x)) {
      per_row(x, member);
      for (int64_t i = 0; member.data && i < (member.stride == 0 && shape_.rows > 0 ? 1 : shape_.rows); ++i) {
        in_range(member.data[i * member.stride]);
      }
      return;
    }
    column_ = whole(x);
    in_range(column_);
    member = {column_ == -1 ? nullptr : &column_, 0};
  }
  // Columns that are left out in every row: None, a list or tuple of them, or bool [V]. A bit each, up to whole tiles.
  void bits(PyObject* x, const uint8_t*& member) {
    member = nullptr;
    const bool is_list = PyList_Check(x), is_empty = is_list && PyList_GET_SIZE(x) == 0;
    if (x == Py_None || is_empty || (PyTuple_Check(x) && PyTuple_GET_SIZE(x) == 0)) return;
    bits_.assign((shape_.columns + 1023) / 1024 * 128, 0);
    const auto leave_out = [&](int64_t v) { bits_[v / 8] |= static_cast<uint8_t>(1 << v % 8); };
    if (is_list || PyTuple_Check(x)) {
      const Py_ssize_t count = PySequence_Fast_GET_SIZE(x);
      for (Py_ssize_t i = 0; i < count; ++i) {
        const int64_t v = whole(PySequence_Fast_GET_ITEM(x, i));
        require(0 <= v && v < shape_.columns);
        leave_out(v);
      }
    } else {
      const Array mask(x);
      require(mask.dtype == torch->boolean && mask.sizes == Sizes{shape_.columns} && mask.has_rows());
      for (int64_t v = 0; v < shape_.columns; ++v) {
        if (static_cast<const bool*>(mask.data)[v]) leave_out(v);
      }
    }
    member = bits_.data();
  }
  // int64 [...] or [..., J], columns or -1.
  void targets(PyObject* x, const int64_t*& member, int64_t& count) {
    const Array array(x);
    const bool one = array.sizes == of_rows;
    count = one ? 1 : array.sizes.empty() ? 0 : array.sizes.back();
    require(array.dtype == torch->int64 && (one || array.sizes == followed_by(count)));
    const Array::Run run = array.run(array.sizes.size());
    require(run.count <= 1 || run.stride == 1);
    member = static_cast<const int64_t*>(array.data), of_targets = array.sizes;
    for (int64_t i = 0; i < run.count; ++i) in_range(member[i]);
  }
  void temperature(PyObject* x, double& member) {
    require(PyFloat_Check(x) || is_int(x));
    member = is_int(x) ? static_cast<double>(whole(x)) : PyFloat_AS_DOUBLE(x);
    require(1e-30 <= member && member <= 1e30);
  }
  void temperature_or_0(PyObject* x, double& member) {
    member = 0.0;
    if (!(PyFloat_Check(x) && PyFloat_AS_DOUBLE(x) == 0.0) && !(is_int(x) && whole(x) == 0)) {
      temperature(x, member);
    }
  }
  void samples(PyObject* x, int64_t& member) {
    member = whole(x);
    require(1 <= member && member < int64_t{1} << 24);
    of_samples = member > 1 ? followed_by(member) : of_rows;
  }
  // Of 64 bits, with a sign or without.
  void seed(PyObject* x, uint64_t& member) {
    require(is_int(x));
    member = PyLong_AsUnsignedLongLongMask(x);
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
    if (overflow == 0 && static_cast<uint64_t>(value) == member) return;
    require(overflow > 0);  // then it must be what the mask has left of it
    const uint64_t all = PyLong_AsUnsignedLongLong(x);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      throw Unfit{};
    }
    member = all;
  }

  Sizes of_rows, of_targets, of_samples;  // of results

  // A new array on the device of the rows.
  template <class T>
  T* make(const Sizes& sizes) {
    static_assert(std::is_same_v<T, int64_t> || std::is_same_v<T, float> || std::is_same_v<T, double>);
    PyObject* const dtype = std::is_same_v<T, int64_t> ? torch->int64
                            : std::is_same_v<T, float> ? torch->float32
                                                       : torch->float64;
    constexpr size_t MOST = 8;
    const size_t count = sizes.size();
    require(count <= MOST);
    PyObject* arguments[MOST + 3] = {like_};
    py::object held[MOST + 1];
    for (size_t i = 0; i < count; ++i) {
      held[i] = py::reinterpret_steal<py::object>(PyLong_FromLongLong(sizes[i]));
      arguments[1 + i] = held[i].ptr();
    }
    if (count == 0) {  // which must be said
      held[0] = py::tuple();
      arguments[1] = held[0].ptr();
    }
    const size_t positional = 1 + (count == 0 ? 1 : count);
    arguments[positional] = dtype;
    static PyObject* const names = PyTuple_Pack(1, DAM_NAME(dtype));
    PyObject* const array = PyObject_VectorcallMethod(DAM_NAME(new_empty), arguments, positional, names);
    if (!array) throw py::error_already_set();
    made_.push_back(py::reinterpret_steal<py::object>(array));
    return static_cast<T*>(reinterpret_cast<void*>(whole(method(array, DAM_NAME(data_ptr)).ptr())));
  }

  // What the call returns: the arrays made, if any, and the kernel's result, if any.
  PyObject* results(py::object own) {
    if (made_.empty()) return own ? own.release().ptr() : py::none().release().ptr();
    if (own) made_.push_back(std::move(own));
    PyObject* const all = PyTuple_New(static_cast<Py_ssize_t>(made_.size()));
    if (!all) throw py::error_already_set();
    for (size_t i = 0; i < made_.size(); ++i) PyTuple_SET_ITEM(all, i, made_[i].release().ptr());
    return all;
  }

 private:
  Sizes followed_by(int64_t size) const {
    Sizes sizes = of_rows;
    sizes.push_back(size);
    return sizes;
  }
  void in_range(int64_t column) const { require(-1 <= column && column < shape_.columns); }

  PyObject *like_ = nullptr, *dtype_ = nullptr;
  Shape shape_{};
  int64_t column_ = -1;
  std::vector<uint8_t> bits_;
  std::vector<py::object> made_;
};

// ---- Whether torch's dispatcher would do nothing with a call but call its op

// Of torch, which dam/ops/_op.py names: a tensor's keys, the thread's, which of these are ordinary, and so on.
struct Watch {
  PyObject *keys_of = nullptr, *keys_of_thread, *function_modes, *profiled, *forward_ad;
  std::vector<uint64_t> plain, no_modes;
};
inline Watch watch;

inline bool among(const std::vector<uint64_t>& all, const py::object& keys) {
  const uint64_t bits = PyLong_AsUnsignedLongLongMask(method(keys.ptr(), DAM_NAME(raw_repr)).ptr());
  for (uint64_t one : all) {
    if (one == bits) return true;
  }
  return false;
}

inline bool is_number(PyObject* x) {  // or nothing, or a text
  const PyTypeObject* const type = Py_TYPE(x);
  return x == Py_None || type == &PyLong_Type || type == &PyFloat_Type || type == &PyBool_Type ||
         type == &PyUnicode_Type;
}

// 0: no; 1: yes; 2: it would also record the call for a gradient.
inline int ordinary(PyObject* const* arguments, Py_ssize_t count) {
  if (!watch.keys_of || !among(watch.no_modes, call(watch.keys_of_thread))) return 0;
  if (whole(call(watch.function_modes).ptr()) != 0 || call(watch.profiled).ptr() != Py_False) return 0;
  if (whole(attribute(watch.forward_ad, DAM_NAME(_current_level)).ptr()) >= 0) return 0;
  bool recorded = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const x = arguments[i];
    if (is_number(x)) continue;
    if (PyList_CheckExact(x) || PyTuple_CheckExact(x)) {
      for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(x); ++k) {
        if (!is_number(PySequence_Fast_GET_ITEM(x, k))) return 0;
      }
      continue;
    }
    const PyObject* const kind = reinterpret_cast<PyObject*>(Py_TYPE(x));
    if (kind != torch->tensor && kind != torch->parameter) return 0;
    const py::object keys = found(PyObject_CallOneArg(watch.keys_of, x));
    if (!among(watch.plain, keys)) return 0;
    recorded = recorded || attribute(x, DAM_NAME(requires_grad)).ptr() == Py_True;
  }
  return recorded && call(torch->grad_enabled).ptr() == Py_True ? 2 : 1;
}

// Whether a head [V, D] and a bias [V] fit hidden states [T, D], all of a dtype that the kernels take; and their logits
// are made in one chunk, so few that Python's part of a call counts, and no variable asks for other ways.
inline bool takes_head(PyObject* hidden, PyObject* weight, PyObject* bias) {
  constexpr int64_t FEW = 1 << 20;
  require(!std::getenv("DAM_LINEAR_FORM") && !std::getenv("DAM_WORKSPACE_MB"));
  const Array states(hidden), head(weight);
  require(states.has_rows() && head.has_rows() && states.sizes.size() == 2 && head.sizes.size() == 2);
  require(code_of(states.dtype) >= 0 && states.dtype == head.dtype);
  require(head.sizes[0] >= 1 && states.sizes[1] == head.sizes[1] && states.sizes[0] <= FEW / head.sizes[0]);
  if (bias == Py_None) return true;
  const Array of_columns(bias);
  return of_columns.dtype == head.dtype && of_columns.sizes == Sizes{head.sizes[0]};
}

}  // namespace look
}  // namespace dam
