// How dam._cpu looks at torch's tensors and makes new ones: by Python's interface, so that it is built without torch and
// for every release of it. What is not such as a kernel takes it is Unfit; what is wrong with it dam.ops says.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
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
  PyObject *float32, *bfloat16, *float16, *float64, *int64, *tensor, *parameter, *threads, *grad_enabled;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto get = [&](const char* name) { return py::object(torch.attr(name)).release().ptr(); };
    float32 = get("float32"), bfloat16 = get("bfloat16"), float16 = get("float16"), float64 = get("float64");
    int64 = get("int64"), tensor = get("Tensor"), threads = get("get_num_threads"), grad_enabled = get("is_grad_enabled");
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

// Of one or two dimensions; sizes and strides that are not there are 1.
struct Array {
  void* data;
  PyObject* dtype;
  Py_ssize_t dimensions;
  int64_t size[2], stride[2];

  explicit Array(PyObject* x) {
    const py::object shape = attribute(x, DAM_NAME(shape)), strides = method(x, DAM_NAME(stride));
    require(PyTuple_Check(shape.ptr()) && PyTuple_Check(strides.ptr()));
    dimensions = PyTuple_GET_SIZE(shape.ptr());
    require(1 <= dimensions && dimensions <= 2 && PyTuple_GET_SIZE(strides.ptr()) == dimensions);
    for (int i = 0; i < 2; ++i) {
      size[i] = i < dimensions ? whole(PyTuple_GET_ITEM(shape.ptr(), i)) : 1;
      stride[i] = i < dimensions ? whole(PyTuple_GET_ITEM(strides.ptr(), i)) : 1;
    }
    dtype = attribute(x, DAM_NAME(dtype)).ptr();  // one of the objects above, or of others that live as long
    data = reinterpret_cast<void*>(whole(method(x, DAM_NAME(data_ptr)).ptr()));
  }

  bool is_matrix() const { return dimensions == 2 && size[1] >= 1 && (stride[1] == 1 || size[1] == 1); }
  bool contiguous() const { return (stride[1] == 1 || size[1] <= 1) && (stride[0] == size[1] || size[0] <= 1); }
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
    require(array.is_matrix() && dtype >= 0);
    shape = {array.size[0], array.size[1], dtype, static_cast<int>(whole(call(torch->threads).ptr()))};
    member = {array.data, array.stride[0]};
    like_ = x, dtype_ = array.dtype, shape_ = shape;
  }
  void like(PyObject* x, Matrix& member) {
    const Array array(x);
    require(array.is_matrix() && array.dtype == dtype_ && array.size[0] == shape_.rows && array.size[1] == shape_.columns);
    member = {array.data, array.stride[0]};
  }
  void per_row(PyObject* x, Indices& member) {
    member = {nullptr, 0};
    if (x == Py_None) return;
    const Array array(x);
    require(array.dimensions == 1 && array.dtype == torch->int64 && array.size[0] == shape_.rows);
    member = {static_cast<const int64_t*>(array.data), array.stride[0]};
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
  // int64 [T] or [T, J], columns or -1.
  void targets(PyObject* x, const int64_t*& member, int64_t& count) {
    const Array array(x);
    require(array.dtype == torch->int64 && array.contiguous() && array.size[0] == shape_.rows);
    member = static_cast<const int64_t*>(array.data), count = array.size[1];
    for (int64_t i = 0; i < shape_.rows * count; ++i) in_range(member[i]);
    of_targets = {array.size[0]};
    if (array.dimensions == 2) of_targets.push_back(count);
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
    of_samples = {shape_.rows};
    if (member > 1) of_samples.push_back(member);
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

  using Sizes = std::vector<int64_t>;
  Sizes of_rows() const { return {shape_.rows}; }
  Sizes of_targets, of_samples;

  // A new array on the device of the rows.
  template <class T>
  T* make(const Sizes& sizes) {
    static_assert(std::is_same_v<T, int64_t> || std::is_same_v<T, float> || std::is_same_v<T, double>);
    PyObject* const dtype = std::is_same_v<T, int64_t> ? torch->int64
                            : std::is_same_v<T, float> ? torch->float32
                                                       : torch->float64;
    PyObject* arguments[4] = {like_};
    py::object held[2];
    const size_t count = sizes.size();
    for (size_t i = 0; i < count; ++i) {
      held[i] = py::reinterpret_steal<py::object>(PyLong_FromLongLong(sizes[i]));
      arguments[1 + i] = held[i].ptr();
    }
    arguments[1 + count] = dtype;
    static PyObject* const names = PyTuple_Pack(1, DAM_NAME(dtype));
    PyObject* const array = PyObject_VectorcallMethod(DAM_NAME(new_empty), arguments, 1 + count, names);
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
  void in_range(int64_t column) const { require(-1 <= column && column < shape_.columns); }

  PyObject *like_ = nullptr, *dtype_ = nullptr;
  Shape shape_{};
  int64_t column_ = -1;
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

// 0: no; 1: yes; 2: it would also record the call for a gradient.
inline int ordinary(PyObject* const* arguments, Py_ssize_t count) {
  if (!watch.keys_of || !among(watch.no_modes, call(watch.keys_of_thread))) return 0;
  if (whole(call(watch.function_modes).ptr()) != 0 || call(watch.profiled).ptr() != Py_False) return 0;
  if (whole(attribute(watch.forward_ad, DAM_NAME(_current_level)).ptr()) >= 0) return 0;
  bool recorded = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const x = arguments[i];
    PyTypeObject* const type = Py_TYPE(x);
    if (x == Py_None || type == &PyLong_Type || type == &PyFloat_Type || type == &PyBool_Type || type == &PyUnicode_Type) {
      continue;
    }
    if (PyList_CheckExact(x)) {
      const Py_ssize_t size = PyList_GET_SIZE(x);
      for (Py_ssize_t k = 0; k < size; ++k) {
        if (!PyBool_Check(PyList_GET_ITEM(x, k))) return 0;
      }
      continue;
    }
    const PyObject* const kind = reinterpret_cast<PyObject*>(type);
    if (kind != torch->tensor && kind != torch->parameter) return 0;
    const py::object keys = found(PyObject_CallOneArg(watch.keys_of, x));
    if (!among(watch.plain, keys)) return 0;
    recorded = recorded || attribute(x, DAM_NAME(requires_grad)).ptr() == Py_True;
  }
  return recorded && call(torch->grad_enabled).ptr() == Py_True ? 2 : 1;
}

// Whether a head [V, D] and a bias [V] fit hidden states [T, D], all of a dtype that the kernels take.
inline bool is_head(PyObject* hidden, PyObject* weight, PyObject* bias) {
  const Array states(hidden), head(weight);
  require(states.is_matrix() && head.is_matrix() && head.size[0] >= 1 && states.size[1] == head.size[1]);
  require(code_of(states.dtype) >= 0 && states.dtype == head.dtype);
  if (bias == Py_None) return true;
  const Array of_columns(bias);
  return of_columns.dimensions == 1 && of_columns.dtype == head.dtype && of_columns.size[0] == head.size[0];
}

}  // namespace look
}  // namespace dam
