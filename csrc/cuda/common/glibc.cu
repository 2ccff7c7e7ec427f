// CUDA's runtime, which is linked statically, loads beside glibc 2.28, too. 2.34 gave what was in libpthread,
// libdl and librt a second version, to which the linker binds it where that or a newer one is installed: here
// the functions jump to their first. The three libraries are there in any process with torch, which wants
// them.

#if defined(__CUDACC__) && defined(__x86_64__) && defined(__linux__)

#  define RK_FIRST_VERSION(function, version)                                                           \
    __asm__(".pushsection .text\n.symver rk_first_" #function ", " #function "@GLIBC_" version          \
            "\n.globl " #function "\n.hidden " #function "\n.type " #function ", @function\n" #function \
            ":\njmp *rk_first_" #function "@GOTPCREL(%rip)\n.popsection");

RK_FIRST_VERSION(dlclose, "2.2.5")
RK_FIRST_VERSION(dlerror, "2.2.5")
RK_FIRST_VERSION(dlmopen, "2.3.4")
RK_FIRST_VERSION(dlopen, "2.2.5")
RK_FIRST_VERSION(dlsym, "2.2.5")
RK_FIRST_VERSION(dlvsym, "2.2.5")
RK_FIRST_VERSION(pthread_condattr_setpshared, "2.2.5")
RK_FIRST_VERSION(pthread_create, "2.2.5")
RK_FIRST_VERSION(pthread_detach, "2.2.5")
RK_FIRST_VERSION(pthread_getspecific, "2.2.5")
RK_FIRST_VERSION(pthread_join, "2.2.5")
RK_FIRST_VERSION(pthread_key_create, "2.2.5")
RK_FIRST_VERSION(pthread_key_delete, "2.2.5")
RK_FIRST_VERSION(pthread_kill, "2.2.5")
RK_FIRST_VERSION(pthread_mutex_trylock, "2.2.5")
RK_FIRST_VERSION(pthread_mutexattr_destroy, "2.2.5")
RK_FIRST_VERSION(pthread_mutexattr_init, "2.2.5")
RK_FIRST_VERSION(pthread_mutexattr_setpshared, "2.2.5")
RK_FIRST_VERSION(pthread_mutexattr_settype, "2.2.5")
RK_FIRST_VERSION(pthread_once, "2.2.5")
RK_FIRST_VERSION(pthread_rwlock_destroy, "2.2.5")
RK_FIRST_VERSION(pthread_rwlock_init, "2.2.5")
RK_FIRST_VERSION(pthread_rwlock_rdlock, "2.2.5")
RK_FIRST_VERSION(pthread_rwlock_timedrdlock, "2.2.5")
RK_FIRST_VERSION(pthread_rwlock_timedwrlock, "2.2.5")
RK_FIRST_VERSION(pthread_rwlock_tryrdlock, "2.2.5")
RK_FIRST_VERSION(pthread_rwlock_trywrlock, "2.2.5")
RK_FIRST_VERSION(pthread_rwlock_unlock, "2.2.5")
RK_FIRST_VERSION(pthread_rwlock_wrlock, "2.2.5")
RK_FIRST_VERSION(pthread_rwlockattr_destroy, "2.2.5")
RK_FIRST_VERSION(pthread_rwlockattr_init, "2.2.5")
RK_FIRST_VERSION(pthread_rwlockattr_setpshared, "2.2.5")
RK_FIRST_VERSION(pthread_setspecific, "2.2.5")
RK_FIRST_VERSION(pthread_spin_destroy, "2.2.5")
RK_FIRST_VERSION(pthread_spin_init, "2.2.5")
RK_FIRST_VERSION(pthread_spin_lock, "2.2.5")
RK_FIRST_VERSION(pthread_spin_trylock, "2.2.5")
RK_FIRST_VERSION(pthread_spin_unlock, "2.2.5")
RK_FIRST_VERSION(sem_destroy, "2.2.5")
RK_FIRST_VERSION(sem_init, "2.2.5")
RK_FIRST_VERSION(sem_post, "2.2.5")
RK_FIRST_VERSION(sem_timedwait, "2.2.5")
RK_FIRST_VERSION(sem_trywait, "2.2.5")
RK_FIRST_VERSION(sem_wait, "2.2.5")
RK_FIRST_VERSION(shm_open, "2.2.5")
RK_FIRST_VERSION(shm_unlink, "2.2.5")

#endif
