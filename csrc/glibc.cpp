// The library loads beside glibc 2.28 and its libstdc++ (manylinux_2_28), whatever newer ones it is built
// with. What their headers would have the linker bind to later versions is defined here, hidden. `make wheel`
// has auditwheel's verdict.
#include <new>
#include <sstream>

#ifdef __GLIBC__

#  define RK_HIDDEN __attribute__((visibility("hidden")))

extern "C" {

// The functions of GLIBC_2.29 differ from those before them in errno alone. aarch64's glibc begins with 2.17.
#  if defined(__x86_64__) || defined(__aarch64__)
#    ifdef __x86_64__
#      define RK_FIRST "GLIBC_2.2.5"
#    else
#      define RK_FIRST "GLIBC_2.17"
#    endif
#    define RK_FIRST_VERSION(function, parameters, ...)                   \
      __asm__(".symver rk_first_" #function ", " #function "@" RK_FIRST); \
      double rk_first_##function parameters;                              \
      RK_HIDDEN double rk_##function parameters __asm__(#function);       \
      double rk_##function parameters { return rk_first_##function(__VA_ARGS__); }

RK_FIRST_VERSION(exp, (double x), x)
RK_FIRST_VERSION(log, (double x), x)
RK_FIRST_VERSION(pow, (double x, double y), x, y)
#  endif

// GLIBC_2.32's flag, which lets a shared_ptr count without atomics. torch has threads: the answer is no.
extern RK_HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;

// GLIBCXX_3.4.29
[[noreturn]] RK_HIDDEN void rk_throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void rk_throw_bad_array_new_length() { throw std::bad_array_new_length(); }

}  // extern "C"

// GLIBCXX_3.4.26
template RK_HIDDEN std::ostringstream::basic_ostringstream();
template RK_HIDDEN std::stringstream::basic_stringstream();

#endif
