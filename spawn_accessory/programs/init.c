// The first process of a PID namespace: reaps what nobody else does, and ends the namespace on SIGTERM.
//
// Called as: init-NAME ADDRESS, where ADDRESS only tells those who list processes whose init it is. It
// cannot print anything, since it has no descriptors; if it cannot give up what it must not have, it
// ends with a status that says which step failed.
//
// Thousands of it run at a time, hence no C library: a static one takes 50 kB in each of them, and
// 700 kB in the first.

#include <asm/signal.h>
#include <asm/unistd.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/errno.h>
#include <linux/filter.h>
#include <linux/prctl.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <linux/wait.h>
#include <stdbool.h>
#include <stddef.h>

enum status { ENDED, NOT_FIRST, NO_SIGNALS, NO_NAME, HAS_DESCRIPTORS, NO_ROOT, HAS_CAPABILITIES, NO_FILTER };

// System calls (syscall(2)); an error is a negative result.

#if defined(__x86_64__)

#define ARCHITECTURE AUDIT_ARCH_X86_64

static long call5(long number, long a, long b, long c, long d, long e)
{
	register long fourth __asm__("r10") = d;
	register long fifth __asm__("r8") = e;
	__asm__ volatile("syscall"
			 : "+a"(number)
			 : "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth)
			 : "rcx", "r11", "memory");
	return number;
}

__asm__(".globl _start\n"
	"_start: xor %ebp, %ebp\n"
	"mov %rsp, %rdi\n"
	"call start\n"); // the kernel aligned the stack as a call wants it

#elif defined(__aarch64__)

#define ARCHITECTURE AUDIT_ARCH_AARCH64

static long call5(long number, long a, long b, long c, long d, long e)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	__asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
	return x0;
}

__asm__(".globl _start\n"
	"_start: mov x29, #0\n"
	"mov x30, #0\n"
	"mov x0, sp\n"
	"b start\n");

#else
#error "how to call the kernel of this architecture is not known"
#endif

#define FIRST_FIVE(number, a, b, c, d, e, ...) \
	call5(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))
#define CALL(name, ...) FIRST_FIVE(__NR_##name, __VA_ARGS__, 0, 0, 0, 0, 0)

// The kernel keeps 15 characters of a thread's name; argv[0] goes on showing all of NAME.
static long set_name(const char *argv0)
{
	enum { KEPT = 15, DASH = 4 };
	size_t length = 0;
	while (length <= KEPT && argv0[length] != '\0')
		length++;
	if (length <= KEPT)
		return CALL(prctl, PR_SET_NAME, argv0);
	char name[KEPT + 1] = "i";
	for (size_t i = 1; i < KEPT && argv0[DASH + i - 1] != '\0'; i++)
		name[i] = argv0[DASH + i - 1];
	return CALL(prctl, PR_SET_NAME, name);
}

// For what takes CAP_SETPCAP, which a service may lack.
static bool done_or_forbidden(long result)
{
	return result == 0 || result == -EPERM;
}

// Only by executing something could capabilities come back, and the filter does not let it: bounding
// set and secure bits are there for the day when a filter has a hole.
static bool close_ways_back(void)
{
	const long bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP |
			  SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_KEEP_CAPS_LOCKED |
			  SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
	for (int i = 0; CALL(prctl, PR_CAPBSET_READ, i) >= 0; i++)
		if (i != CAP_KILL && !done_or_forbidden(CALL(prctl, PR_CAPBSET_DROP, i)))
			return false;
	return done_or_forbidden(CALL(prctl, PR_SET_SECUREBITS, bits)) &&
	       CALL(prctl, PR_SET_NO_NEW_PRIVS, 1) == 0;
}

// Keeps CAP_KILL if it is there. What is not inheritable is not ambient, either.
//
// The process stays dumpable: those who look after it open /proc/PID/ns/pid, and root without
// CAP_SYS_PTRACE may do that only with a process that is, and that has no capability more than they.
static bool drop_capabilities(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];
	if (CALL(capget, &header, sets) < 0)
		return false;
	const __u32 kept = sets[0].permitted & CAP_TO_MASK(CAP_KILL);
	sets[0] = (struct __user_cap_data_struct){ .effective = kept, .permitted = kept };
	sets[1] = (struct __user_cap_data_struct){ 0 };
	if (CALL(capset, &header, sets) < 0 || CALL(capget, &header, sets) < 0)
		return false;
	return sets[0].effective == kept && sets[0].permitted == kept && sets[0].inheritable == 0 &&
	       sets[1].effective == 0 && sets[1].permitted == 0 && sets[1].inheritable == 0;
}

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define UNLESS_SKIP(value, count) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, count)
#define RETURN(action) BPF_STMT(BPF_RET | BPF_K, action)
#define ALLOW(name) UNLESS_SKIP(__NR_##name, 1), RETURN(SECCOMP_RET_ALLOW)

// Allows what is called from here on, and nothing else.
static long set_filter(void)
{
	static const struct sock_filter instructions[] = {
		LOAD(arch),
		UNLESS_SKIP(ARCHITECTURE, 5),
		LOAD(nr),
		ALLOW(rt_sigtimedwait),
		ALLOW(exit_group),
		RETURN(SECCOMP_RET_KILL_PROCESS),
	};
	const struct sock_fprog program = { sizeof instructions / sizeof *instructions,
					    (struct sock_filter *)instructions };
	return CALL(prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static const unsigned long awaited = 1UL << (SIGTERM - 1); // as large as the kernel's sigset_t

static bool set_signals(void)
{
	// What is neither blocked nor handled is discarded when it is sent to the first process, except
	// SIGKILL and SIGSTOP from outside (pid_namespaces(7)).
	if (CALL(rt_sigprocmask, SIG_SETMASK, &awaited, NULL, sizeof awaited) < 0)
		return false;
	// Who ignores SIGCHLD has children that the kernel reaps by itself (wait(2)), adopted ones, too.
	const struct sigaction ignore = { .sa_handler = SIG_IGN };
	if (CALL(rt_sigaction, SIGCHLD, &ignore, NULL, sizeof awaited) < 0)
		return false;
	while (CALL(wait4, -1, NULL, WNOHANG, NULL) > 0) // those that ended before
		;
	return true;
}

static enum status set_up(int argc, char **argv)
{
	if (argc < 1 || CALL(getpid, 0) != 1)
		return NOT_FIRST;
	if (!set_signals()) // at once, since a SIGTERM that comes earlier is lost
		return NO_SIGNALS;
	if (set_name(argv[0]) < 0)
		return NO_NAME;
	if (CALL(close_range, 0, ~0U, 0) < 0)
		return HAS_DESCRIPTORS;
	if (CALL(chdir, "/") < 0)
		return NO_ROOT;
	CALL(setsid, 0); // refused if it leads a session already
	if (!close_ways_back() || !drop_capabilities())
		return HAS_CAPABILITIES;
	return set_filter() < 0 ? NO_FILTER : ENDED;
}

__attribute__((noreturn, used)) static void start(long *stack)
{
	const enum status status = set_up((int)stack[0], (char **)(stack + 1));
	if (status == ENDED)
		while (CALL(rt_sigtimedwait, &awaited, NULL, NULL, sizeof awaited) != SIGTERM)
			; // interrupted, as by SIGSTOP and SIGCONT
	CALL(exit_group, status);
	__builtin_unreachable();
}
