/*
 * A process spawner as fast as the kernel allows, for tests and benchmarks of the reaper.  It
 * behaves as beng-proxy's does: mkdir, xattr, clone3(CLONE_INTO_CGROUP), and the whole job again
 * if the reaper deleted the cgroup in between.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define EXECUTABLE "/bin/true"

enum {
    MAX_RETRIES = 1000, /* per job */
    MAX_WORKERS = 1024,
    ANNOUNCE_BATCH = 32,
    /* A prefix of at most NAME_MAX, "-", a number, "/s", a number. */
    PATH_SIZE = NAME_MAX + 64,
};

static const char help[] =
    "usage: spawner [options] SCOPE COUNT\n"
    "\n"
    "Run COUNT jobs, each a short process born into a cgroup below SCOPE, the absolute path of an\n"
    "existing cgroup v2 directory.  At the end one line of JSON goes to standard error; the exit\n"
    "status is 0 only if all jobs ran.\n"
    "\n"
    "  --prefix P    name the cgroups P-0, P-1, ... (default: job)\n"
    "  --names K     use only K names, again and again\n"
    "  --sessions    give each job I a cgroup sI of its own below the named one\n"
    "  --account A   set the xattr user.account=A on each named cgroup right after its mkdir\n"
    "  --enter NAME  first create SCOPE/NAME and move the spawner into it\n"
    "  --empty       make the cgroups only, run nothing in them\n"
    "  --spin USEC   let each process burn that much CPU time\n"
    "  --exec        let each process execute " EXECUTABLE "\n"
    "  --pause USEC  sleep between jobs\n"
    "  --announce    write each job's cgroup, relative to SCOPE, to standard output after the job\n"
    "  --workers N   split the jobs over N processes (default: 1)\n"
    "  --help        show this text\n"
    "\n"
    "In the JSON, \"created\" counts successful mkdirs: \"names\" those of the named cgroups,\n"
    "\"targets\" those of the processes' own (the same cgroups without --sessions).\n";

/* Global because the child, on a stack of its own, gets no argument. */
static struct {
    const char *scope;
    unsigned long count;
    const char *prefix;
    unsigned long names; /* 0: one name for each job */
    const char *account;
    const char *enter;
    unsigned long spin_usec;
    unsigned long pause_usec;
    unsigned long workers;
    bool sessions;
    bool empty;
    bool exec;
    bool announce;
} options = {.prefix = "job", .workers = 1};

struct result {
    unsigned long names, targets, jobs, retries;
    double cpu;
};

/* Shared by all workers. */
struct board {
    atomic_bool failed;
    struct result results[MAX_WORKERS];
};

static struct board *board;

struct announcer {
    unsigned int jobs;
    size_t length;
    char buffer[PIPE_BUF]; /* at most this much: writes of several workers must not mix */
};

struct job {
    char name[PATH_SIZE];
    char target[PATH_SIZE];
};

/* Only the first failure is reported; the other workers stop at their next job. */
static bool first_failure(void)
{
    return !atomic_exchange(&board->failed, true);
}

/* The path is relative to the scope, "" for the scope itself.  Returns false. */
static bool fail(const char *what, const char *path)
{
    const int error = errno;

    if (first_failure())
        fprintf(stderr, "spawner: cannot %s %s%s%s: %s\n", what, options.scope,
                *path != '\0' ? "/" : "", path, strerror(error));
    return false;
}

static _Noreturn void child(void)
{
    if (options.spin_usec > 0) {
        /* The clock of this process starts at zero: CLONE_VM shares memory, not CPU time. */
        struct timespec used;
        do
            clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
        while ((unsigned long)used.tv_sec * 1000000 + (unsigned long)used.tv_nsec / 1000 <
               options.spin_usec);
    }

    if (options.exec) {
        static char *const arguments[] = {EXECUTABLE, NULL};
        execv(EXECUTABLE, arguments);
        _exit(127);
    }

    _exit(0);
}

/*
 * Run child() in a new process in the given cgroup, and return its pid once it has executed or
 * exited; -1 with errno on error.
 *
 * The child borrows our memory, which halves the time of a job compared with a copy of it.  libc
 * has no wrapper for clone3, and its syscall() cannot do this: the child would return from it on
 * an empty stack.  Hence the assembly, which enters child() without returning from anything.
 */
static pid_t clone_into(int cgroup)
{
    struct clone_args args = {
        .flags = CLONE_INTO_CGROUP | CLONE_VFORK,
        .exit_signal = SIGCHLD,
        .cgroup = (__u64)cgroup,
    };

#if defined(__LP64__) && (defined(__x86_64__) || defined(__aarch64__))
    /* One is enough, for CLONE_VFORK lets us continue only after the child has left it. */
    static _Alignas(16) char stack[64 * 1024];

    args.flags |= CLONE_VM;
    args.stack = (uintptr_t)stack;
    args.stack_size = sizeof(stack);

    /* In the child, all registers but the result and the stack pointer are as in the parent. */
#ifdef __x86_64__
    long result = SYS_clone3;
    __asm__ volatile("syscall\n\t"
                     "testq %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xorl %%ebp, %%ebp\n\t" /* ends backtraces */
                     "callq *%[child]\n\t"
                     "1:"
                     : "+a"(result)
                     : "D"(&args), "S"(sizeof(args)), [child] "r"(child)
                     : "rcx", "r11", "cc", "memory");
#else
    register long result __asm__("x0") = (long)&args;
    register long size __asm__("x1") = sizeof(args);
    register long number __asm__("x8") = SYS_clone3;
    __asm__ volatile("svc #0\n\t"
                     "cbnz x0, 1f\n\t"
                     "mov x29, xzr\n\t" /* ends backtraces */
                     "blr %[child]\n"
                     "1:"
                     : "+r"(result)
                     : "r"(size), "r"(number), [child] "r"(child)
                     : "cc", "memory");
#endif
    if (result < 0) {
        errno = (int)-result;
        return -1;
    }
    return (pid_t)result;
#else
    const long result = syscall(SYS_clone3, &args, sizeof(args));
    if (result == 0)
        child();
    return (pid_t)result;
#endif
}

static bool make_cgroup(const char *path, unsigned long *created)
{
    if (mkdir(path, 0777) == 0)
        ++*created;
    else if (errno != EEXIST)
        return false;
    return true;
}

/*
 * Try the job once.  Returns NULL if it is under way, its process in *pid (0 if there is to be
 * none), otherwise what could not be done, with errno.
 */
static const char *try_job(const struct job *job, struct result *result, pid_t *pid)
{
    const unsigned long names_before = result->names;

    *pid = 0;
    if (!make_cgroup(job->name, &result->names))
        return "create";

    if (options.account != NULL && result->names != names_before &&
        setxattr(job->name, "user.account", options.account, strlen(options.account), 0) < 0)
        return "set user.account on";

    if (!options.sessions)
        result->targets = result->names;
    else if (!make_cgroup(job->target, &result->targets))
        return "create";

    if (options.empty)
        return NULL;

    const int fd = open(job->target, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return "open";

    *pid = clone_into(fd);
    const int error = errno;
    close(fd);
    errno = error;
    return *pid < 0 ? "spawn into" : NULL;
}

static bool run_job(const struct job *job, struct result *result)
{
    const char *problem;
    pid_t pid;

    for (int retries = 0; (problem = try_job(job, result, &pid)) != NULL; ++retries) {
        /* The reaper may delete the cgroup at any moment until there is a process in it. */
        if ((errno != ENOENT && errno != ENODEV) || retries == MAX_RETRIES)
            return fail(problem, job->target);
        ++result->retries;
    }

    if (pid > 0) {
        int status;
        if (waitpid(pid, &status, 0) < 0)
            return fail("wait for the process in", job->target);
        if (status != 0) {
            if (first_failure())
                fprintf(stderr, "spawner: the process in %s/%s %s %d\n", options.scope,
                        job->target, WIFSIGNALED(status) ? "died of signal" : "exited with",
                        WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
            return false;
        }
    }

    ++result->jobs;
    return true;
}

static bool flush(struct announcer *announcer)
{
    const char *position = announcer->buffer;

    while (announcer->length > 0) {
        const ssize_t n = write(STDOUT_FILENO, position, announcer->length);
        if (n < 0)
            return fail("announce the jobs of", "");
        position += n;
        announcer->length -= (size_t)n;
    }
    announcer->jobs = 0;
    return true;
}

static bool announce(struct announcer *announcer, const char *target)
{
    const size_t length = strlen(target);

    if (announcer->length + length + 1 > sizeof(announcer->buffer) && !flush(announcer))
        return false;
    memcpy(announcer->buffer + announcer->length, target, length);
    announcer->length += length;
    announcer->buffer[announcer->length++] = '\n';

    /* Whoever listens should not wait out a pause for what already is. */
    return (++announcer->jobs < ANNOUNCE_BATCH && options.pause_usec == 0) || flush(announcer);
}

static double cpu_seconds(void)
{
    struct rusage self;

    getrusage(RUSAGE_SELF, &self);
    return (double)(self.ru_utime.tv_sec + self.ru_stime.tv_sec) +
           (double)(self.ru_utime.tv_usec + self.ru_stime.tv_usec) / 1e6;
}

static bool run_jobs(unsigned long worker, struct result *result)
{
    const struct timespec pause = {
        .tv_sec = (time_t)(options.pause_usec / 1000000),
        .tv_nsec = (long)(options.pause_usec % 1000000) * 1000,
    };
    struct announcer announcer = {.length = 0};

    for (unsigned long i = worker; i < options.count; i += options.workers) {
        if (atomic_load_explicit(&board->failed, memory_order_relaxed))
            return false;
        if (options.pause_usec > 0 && i != worker)
            nanosleep(&pause, NULL);

        struct job job;
        const unsigned long number = options.names > 0 ? i % options.names : i;
        int length = snprintf(job.name, sizeof(job.name), "%s-%lu", options.prefix, number);
        memcpy(job.target, job.name, (size_t)length + 1);
        if (options.sessions)
            sprintf(job.target + length, "/s%lu", i);

        if (!run_job(&job, result) || (options.announce && !announce(&announcer, job.target)))
            return false;
    }
    return flush(&announcer);
}

static bool work(unsigned long worker)
{
    /* Not counted on the board itself, where the workers would share cache lines. */
    struct result result = {.names = 0};
    const bool success = run_jobs(worker, &result);

    result.cpu = cpu_seconds();
    board->results[worker] = result;
    return success;
}

/* Worker 0 is this very process. */
static bool run_workers(void)
{
    static pid_t workers[MAX_WORKERS];
    unsigned long started = 1;
    bool success = true;

    for (; success && started < options.workers; ++started) {
        const pid_t pid = fork();
        if (pid < 0) {
            success = fail("start a worker for", "");
            break;
        }
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL); /* who kills the spawner means all of it */
            _exit(work(started) ? EXIT_SUCCESS : EXIT_FAILURE);
        }
        workers[started] = pid;
    }

    success = work(0) && success;

    for (unsigned long w = 1; w < started; ++w) {
        int status;
        if (waitpid(workers[w], &status, 0) < 0)
            success = fail("wait for a worker for", "");
        else if (status != 0) {
            success = false;
            if (first_failure()) /* one that failed by itself has said why */
                fprintf(stderr, "spawner: a worker for %s died of signal %d\n", options.scope,
                        WTERMSIG(status));
        }
    }
    return success;
}

/* Real spawners live in a cgroup below the scope, too. */
static bool enter(const char *name)
{
    unsigned long created = 0;

    if (!make_cgroup(name, &created))
        return fail("create", name);

    char path[PATH_SIZE];
    snprintf(path, sizeof(path), "%s/cgroup.procs", name);
    const int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return fail("open", path);
    const bool success = write(fd, "0", 1) == 1 || fail("write to", path);
    close(fd);
    return success;
}

static _Noreturn void die(const char *message, const char *argument)
{
    fprintf(stderr, "spawner: %s: %s (see --help)\n", message, argument);
    exit(EXIT_FAILURE);
}

static unsigned long parse_number(const char *text, unsigned long minimum, unsigned long maximum)
{
    char *end;

    errno = 0;
    const unsigned long value = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0' || errno != 0 || value < minimum ||
        value > maximum)
        die("not a valid number here", text);
    return value;
}

static const char *parse_name(const char *text)
{
    if (*text == '\0' || strlen(text) > NAME_MAX || strpbrk(text, "/\n") != NULL)
        die("not a name for a cgroup", text);
    return text;
}

static void parse_options(int argc, char **argv)
{
    enum { PREFIX, NAMES, SESSIONS, ACCOUNT, ENTER, EMPTY, SPIN, EXEC, PAUSE, ANNOUNCE, WORKERS,
           HELP };
    static const struct option long_options[] = {
        {"prefix", required_argument, NULL, PREFIX},
        {"names", required_argument, NULL, NAMES},
        {"sessions", no_argument, NULL, SESSIONS},
        {"account", required_argument, NULL, ACCOUNT},
        {"enter", required_argument, NULL, ENTER},
        {"empty", no_argument, NULL, EMPTY},
        {"spin", required_argument, NULL, SPIN},
        {"exec", no_argument, NULL, EXEC},
        {"pause", required_argument, NULL, PAUSE},
        {"announce", no_argument, NULL, ANNOUNCE},
        {"workers", required_argument, NULL, WORKERS},
        {"help", no_argument, NULL, HELP},
        {NULL, 0, NULL, 0},
    };
    int option;

    while ((option = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
        switch (option) {
        case PREFIX: options.prefix = parse_name(optarg); break;
        case NAMES: options.names = parse_number(optarg, 1, ULONG_MAX); break;
        case SESSIONS: options.sessions = true; break;
        case ACCOUNT: options.account = optarg; break;
        case ENTER: options.enter = parse_name(optarg); break;
        case EMPTY: options.empty = true; break;
        case SPIN: options.spin_usec = parse_number(optarg, 0, UINT_MAX); break;
        case EXEC: options.exec = true; break;
        case PAUSE: options.pause_usec = parse_number(optarg, 0, UINT_MAX); break;
        case ANNOUNCE: options.announce = true; break;
        case WORKERS: options.workers = parse_number(optarg, 1, MAX_WORKERS); break;
        case HELP: fputs(help, stdout); exit(EXIT_SUCCESS);
        default: exit(EXIT_FAILURE); /* getopt has said why */
        }
    }

    if (argc - optind != 2)
        die("wrong number of arguments", "need SCOPE and COUNT");
    options.scope = argv[optind];
    if (options.scope[0] != '/')
        die("not an absolute path", options.scope);
    options.count = parse_number(argv[optind + 1], 0, UINT_MAX);
}

int main(int argc, char **argv)
{
    struct timespec start, end;

    parse_options(argc, argv);

    /* All paths below are relative: the shorter, the faster. */
    if (chdir(options.scope) < 0)
        die(strerror(errno), options.scope);

    board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (board == MAP_FAILED)
        die(strerror(errno), "shared memory");

    if (options.enter != NULL && !enter(options.enter))
        return EXIT_FAILURE;

    clock_gettime(CLOCK_MONOTONIC, &start);
    if (!run_workers())
        return EXIT_FAILURE;
    clock_gettime(CLOCK_MONOTONIC, &end);

    struct result sum = {.names = 0};
    for (unsigned long w = 0; w < options.workers; ++w) {
        const struct result *result = &board->results[w];
        sum.names += result->names;
        sum.targets += result->targets;
        sum.jobs += result->jobs;
        sum.retries += result->retries;
        sum.cpu += result->cpu;
    }
    fprintf(stderr,
            "{\"created\": {\"names\": %lu, \"targets\": %lu}, \"jobs\": %lu, \"retries\": %lu, "
            "\"seconds\": %.6f, \"cpu\": %.6f}\n",
            sum.names, sum.targets, sum.jobs, sum.retries,
            (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9,
            sum.cpu);
    return EXIT_SUCCESS;
}
