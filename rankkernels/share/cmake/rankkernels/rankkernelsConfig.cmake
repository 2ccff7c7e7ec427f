# The ops for programs in C++: link rankkernels::rankkernels beside torch, and the ops are there when main begins.
# Python says where this is: -DCMAKE_PREFIX_PATH=$(python -c "import rankkernels; print(rankkernels.cmake_prefix)")
get_filename_component(_rankkernels_folder "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT EXISTS "${_rankkernels_folder}/librankkernels.so")
  set(rankkernels_FOUND FALSE)
  set(rankkernels_NOT_FOUND_MESSAGE "rankkernels was installed without its C++ extension")
  return()
endif()
if(NOT TARGET rankkernels::rankkernels)
  add_library(rankkernels::rankkernels SHARED IMPORTED)
  # Nothing calls the library by name, so the linker has to be told to keep it.
  set_target_properties(rankkernels::rankkernels PROPERTIES
    IMPORTED_LOCATION "${_rankkernels_folder}/librankkernels.so"
    IMPORTED_SONAME "librankkernels.so"
    INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
endif()
