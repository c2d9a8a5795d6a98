/* Lets user-mode Linux 6.1 run on processors with a large vector state (AMX).
 *
 * It saves and restores a process's vector registers in a buffer of fixed size;
 * the host's kernel gives what fits, and refuses to take back anything but the
 * whole. Preloaded, this completes what is put back with what the process has.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

#define STATE_MAX 65536 /* bytes; with AMX it is 11,008 */

static long (*real)(int request, int pid, void *address, void *data);

long ptrace(enum __ptrace_request request, ...)
{
    static char whole[STATE_MAX]; /* the caller has one thread that traces */
    va_list arguments;
    va_start(arguments, request);
    int pid = va_arg(arguments, int);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (!real)
        real = (long (*)(int, int, void *, void *))dlsym(RTLD_NEXT, "ptrace");
    if ((int)request != PTRACE_SETREGSET || (long)address != NT_X86_XSTATE)
        return real(request, pid, address, data);

    struct iovec *given = data;
    struct iovec full = {whole, sizeof whole};
    if (real(PTRACE_GETREGSET, pid, address, &full) != 0 || full.iov_len <= given->iov_len)
        return real(request, pid, address, data);
    memcpy(whole, given->iov_base, given->iov_len);
    return real(request, pid, address, &full);
}
