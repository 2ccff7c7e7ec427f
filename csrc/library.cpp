// Defines the ops when the library is loaded, in a process without Python, too. setup.py writes the schemas,
// which stand in rankkernels/ops: a list of strings.
#include <torch/csrc/stable/library.h>

#include <rankkernels_schemas.inc>

STABLE_TORCH_LIBRARY(rankkernels, m) {
  for (const char* schema : rk::kSchemas) m.def(schema);
}
