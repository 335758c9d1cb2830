// How the Python modules take the members of an op's arguments: by name, each once. Arrays come as tuples of an address
// (0: absent) and strides, as dam/backends/address.py makes them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../core/arguments.h"

namespace dam {
namespace python {

namespace py = pybind11;

inline int64_t integer(PyObject* x) {
  const long long value = PyLong_AsLongLong(x);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

template <class T>
T* address(PyObject* x) {
  const size_t value = PyLong_AsSize_t(x);
  if (value == static_cast<size_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
  return reinterpret_cast<T*>(value);
}

// Item i of a tuple of `size` items.
inline PyObject* item(PyObject* x, Py_ssize_t i, Py_ssize_t size) {
  if (!PyTuple_Check(x) || PyTuple_GET_SIZE(x) != size) {
    throw py::type_error("must be a tuple of " + std::to_string(size) + " integers");
  }
  return PyTuple_GET_ITEM(x, i);
}

inline void take(PyObject* x, int64_t& member) { member = integer(x); }
inline void take(PyObject* x, int& member) { member = static_cast<int>(integer(x)); }
inline void take(PyObject* x, uint64_t& member) {
  member = PyLong_AsUnsignedLongLong(x);
  if (member == static_cast<uint64_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
}
inline void take(PyObject* x, bool& member) { member = integer(x) != 0; }
inline void take(PyObject* x, double& member) {
  member = PyFloat_AsDouble(x);
  if (member == -1.0 && PyErr_Occurred()) throw py::error_already_set();
}
template <class T>
void take(PyObject* x, T*& member) {
  member = address<T>(x);
}
inline void take(PyObject* x, Matrix& member) { member = {address<void>(item(x, 0, 2)), integer(item(x, 1, 2))}; }
inline void take(PyObject* x, Indices& member) { member = {address<int64_t>(item(x, 0, 2)), integer(item(x, 1, 2))}; }
inline void take(PyObject* x, Cube& member) {
  member = {address<void>(item(x, 0, 3)), integer(item(x, 1, 3)), integer(item(x, 2, 3))};
}

// The keyword arguments of one call.
class Call {
 public:
  Call(const char* op, const py::kwargs& arguments) : op_(op) {
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(arguments.ptr(), &at, &name, &value);) add(name, value);
  }
  // As a function of METH_FASTCALL | METH_KEYWORDS gets them: values, and the names of those that have one.
  Call(const char* op, PyObject* const* values, Py_ssize_t positional, PyObject* names) : op_(op) {
    if (positional != 0) throw py::type_error(std::string(op_) + "() takes named arguments only");
    const Py_ssize_t count = names ? PyTuple_GET_SIZE(names) : 0;
    for (Py_ssize_t i = 0; i < count; ++i) add(PyTuple_GET_ITEM(names, i), values[i]);
  }

  // The argument of this name, which is interned.
  PyObject* operator[](PyObject* name) {
    for (int i = 0; i < given_; ++i) {  // most are given in the order in which they are taken
      Argument& argument = arguments_[(taken_ + i) % given_];
      if (argument.name != name && PyUnicode_Compare(argument.name, name) != 0) continue;
      ++taken_;
      argument.taken = true;
      return argument.value;
    }
    throw py::type_error(std::string(op_) + "() is missing the argument " + text(name));
  }

  // Raises for an argument that was not asked for.
  void finish() const {
    for (int i = 0; i < given_; ++i) {
      const Argument& argument = arguments_[i];
      if (!argument.taken) throw py::type_error(std::string(op_) + "() has no argument " + text(argument.name));
    }
  }

 private:
  static constexpr int MOST = 32;  // arguments of an op
  static std::string text(PyObject* name) { return py::cast<std::string>(py::handle(name)); }

  struct Argument {
    PyObject *name, *value;
    bool taken;
  };
  void add(PyObject* name, PyObject* value) {
    if (given_ == MOST) throw py::type_error(std::string(op_) + "() has fewer arguments");
    arguments_[given_++] = {name, value, false};
  }

  const char* op_;
  Argument arguments_[MOST];
  int given_ = 0, taken_ = 0;
};

}  // namespace python
}  // namespace dam

// The interned name of a member.
#define DAM_NAME(name)                                                   \
  ([] {                                                                  \
    static PyObject* const interned = PyUnicode_InternFromString(#name); \
    return interned;                                                     \
  }())
