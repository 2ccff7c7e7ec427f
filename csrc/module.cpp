// The Python module `rankkernels._C` is empty: importing it loads the shared library, and loading it runs the
// static registrations (STABLE_TORCH_LIBRARY_IMPL) of every op's C++ file.
#include <Python.h>

static PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&module_def); }
