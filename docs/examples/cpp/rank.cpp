// One user's candidates scored by a package of AOTInductor, in a process without Python.
//
//   rank din.pt2 user=7 clicks=3,1,4,1,5 item=0,1,2,3
//
// The inputs are in the order of the example that was exported: the user's features, then the candidates'. A
// list of ids is [n], one id after a colon a scalar: user:7. Prints a score a line.
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// name=1,2,3 -> int64 [3]; name:1 -> int64 [].
at::Tensor parsed(const std::string& argument) {
  const size_t end = argument.find_first_of("=:");
  if (end == std::string::npos) throw std::invalid_argument("no value in " + argument);
  std::vector<int64_t> ids;
  std::stringstream values(argument.substr(end + 1));
  for (std::string id; std::getline(values, id, ',');) ids.push_back(std::stoll(id));
  const at::Tensor list = at::tensor(ids, at::kLong);
  return argument[end] == ':' ? list.reshape({}) : list;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 NAME=ID,ID,.. or NAME:ID ...\n", argv[0]);
    return 2;
  }
  try {
    const c10::InferenceMode guard;
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    std::vector<at::Tensor> inputs;
    for (int i = 2; i < argc; ++i) inputs.push_back(parsed(argv[i]));
    const at::Tensor scores = model.run(inputs).at(0);
    for (int64_t c = 0; c < scores.size(0); ++c) std::printf("%.9g\n", scores.data_ptr<float>()[c]);
  } catch (const std::exception& error) {  // an unknown id names its feature
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
