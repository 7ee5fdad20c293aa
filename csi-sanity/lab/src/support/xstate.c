/*
 * Preloaded into User-Mode Linux, which sets the floating-point registers of its processes from a buffer as large as they were when
 * it was written (arch/x86/um, HOST_FP_SIZE of Linux 6.1). Linux takes nothing but all of them (xstateregs_set,
 * arch/x86/kernel/fpu/regset.c), and on processors with AMX they are larger: the machine would die before its first process. What the
 * buffer lacks is taken from the process itself.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
	static long (*next)(enum __ptrace_request, ...);
	/* User-Mode Linux has one thread that traces. */
	static char registers[1 << 16];
	va_list list;
	va_start(list, request);
	pid_t pid = va_arg(list, pid_t);
	void *addr = va_arg(list, void *);
	void *data = va_arg(list, void *);
	va_end(list);
	if (!next)
		next = dlsym(RTLD_NEXT, "ptrace");
	if (request == PTRACE_SETREGSET && (long)addr == NT_X86_XSTATE) {
		struct iovec *some = data, all = { registers, sizeof(registers) };
		if (next(PTRACE_GETREGSET, pid, addr, &all) == 0 && some->iov_len < all.iov_len) {
			memcpy(registers, some->iov_base, some->iov_len);
			return next(request, pid, addr, &all);
		}
	}
	return next(request, pid, addr, data);
}
