/*
 * The floor of the reaper benchmark: the bare system calls which a reaper must do for each cgroup,
 * in a bare loop.  What a real reaper costs above this is its own.
 *
 * It reads from standard input which cgroups there are, where a reaper must find out by itself,
 * and it judges nothing: a cgroup is released 50 ms after it was announced.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum {
    DELAY_NS = 50 * 1000 * 1000,
    /* New cgroups must get their watches at once: look for them again after so many releases. */
    RELEASE_BATCH = 64,
};

static const char usage[] =
    "usage: floor [--flush] SCOPE\n"
    "\n"
    "Read names of cgroups relative to SCOPE, one a line, from standard input (see spawner\n"
    "--announce); watch each at once, 50 ms later read its statistics, write a line of log to\n"
    "standard output and delete it.  At the end one line of JSON goes to standard error.\n"
    "\n"
    "  --flush  read the scope's own cpu.stat before each batch of releases\n";

/*
 * The kernel keeps the siblings with new statistics in a singly linked list, newest first, and to
 * read cpu.stat of one it looks for its predecessor from the start: with 20000 alive, 1 ms for the
 * oldest, so who falls behind falls ever further.  Reading cpu.stat of their parent empties the
 * list, which takes 0.5 us for each.
 */
static bool flush;

/* Read once for each cgroup if its controller is enabled and the kernel has the file. */
static struct {
    const char *controller;
    const char *name;
    bool wanted;
} statistics[] = {
    {"memory", "memory.peak", false},
    {"memory", "memory.events", false},
    {"memory", "memory.swap.peak", false},
    {"pids", "pids.peak", false},
    {"pids", "pids.events", false},
    {"pids", "pids.forks", false},
    {"io", "io.stat", false},
};

enum { N_STATISTICS = sizeof(statistics) / sizeof(statistics[0]) };

struct cgroup {
    struct cgroup *next;
    int64_t due;
    int directory_watch, events_watch;
    bool logged;
    char name[];
};

/* All wait equally long, so the first in is the first due. */
static struct cgroup *first, **last = &first;

static int inotify_fd;
static unsigned long released;

static _Noreturn void die(const char *what, const char *path)
{
    fprintf(stderr, "floor: cannot %s %s: %s\n", what, path, strerror(errno));
    exit(EXIT_FAILURE);
}

static int64_t now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* Returns the length, or -1 if there is no such file (any more). */
static ssize_t read_file(int directory, const char *name, char *buffer, size_t size)
{
    const int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        if (errno != ENOENT && errno != ENODEV)
            die("open", name);
        return -1;
    }

    const ssize_t n = read(fd, buffer, size);
    if (n < 0 && errno != ENODEV)
        die("read", name);
    close(fd);
    return n;
}

static void touch_file(int directory, const char *name)
{
    char buffer[4096];

    read_file(directory, name, buffer, sizeof(buffer));
}

static void choose_controllers(void)
{
    char enabled[4096];
    const ssize_t n = read_file(AT_FDCWD, "cgroup.subtree_control", enabled, sizeof(enabled) - 1);

    if (n < 0)
        die("read", "cgroup.subtree_control");
    enabled[n] = '\0';

    char *rest = enabled;
    for (char *controller; (controller = strsep(&rest, " \n")) != NULL;)
        for (size_t i = 0; i < N_STATISTICS; ++i)
            if (strcmp(controller, statistics[i].controller) == 0)
                statistics[i].wanted = true;
}

/* The cgroups of one scope have all the same files, so the first one tells. */
static void choose_files(int directory)
{
    static bool done;

    for (size_t i = 0; i < N_STATISTICS && !done; ++i)
        if (statistics[i].wanted)
            statistics[i].wanted = faccessat(directory, statistics[i].name, R_OK, 0) == 0;
    done = true;
}

static void enqueue(struct cgroup *cgroup, int64_t time)
{
    cgroup->due = time + DELAY_NS;
    cgroup->next = NULL;
    *last = cgroup;
    last = &cgroup->next;
}

static struct cgroup *dequeue(void)
{
    struct cgroup *const cgroup = first;

    first = cgroup->next;
    if (first == NULL)
        last = &first;
    return cgroup;
}

static void watch(const char *name, size_t length, int64_t time)
{
    static const char file[] = "/cgroup.events";
    struct cgroup *const cgroup = malloc(sizeof(*cgroup) + length + sizeof(file));
    if (cgroup == NULL)
        die("allocate memory for", name);

    cgroup->logged = false;
    memcpy(cgroup->name, name, length);
    memcpy(cgroup->name + length, file, sizeof(file));
    cgroup->events_watch = inotify_add_watch(inotify_fd, cgroup->name, IN_MODIFY);
    cgroup->name[length] = '\0';
    cgroup->directory_watch =
        inotify_add_watch(inotify_fd, cgroup->name, IN_CREATE | IN_DELETE | IN_ONLYDIR);

    /* A name announced again may be gone already; release() will notice. */
    if ((cgroup->events_watch < 0 || cgroup->directory_watch < 0) && errno != ENOENT)
        die("watch", cgroup->name);
    enqueue(cgroup, time);
}

static void log_statistics(const char *name)
{
    char line[PATH_MAX];
    const int length = snprintf(
        line, sizeof(line), "%s: since=2026-02-13T12:15:30Z cpu=0.0s/0.0s/0.0s\n", name);

    if (write(STDOUT_FILENO, line, (size_t)length) < 0)
        die("write to", "standard output");
}

/* Returns false if the cgroup is still in use. */
static bool release(struct cgroup *cgroup)
{
    int directory = -1;

    if (!cgroup->logged) {
        /* Not O_PATH: a reaper reads extended attributes through it. */
        directory = open(cgroup->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (directory >= 0) {
            choose_files(directory);

            /* Once when the cgroup is found, once just before its deletion. */
            for (int i = 0; i < 2; ++i) {
                touch_file(directory, "cgroup.events");
                touch_file(directory, "cpu.stat");
            }
            for (size_t i = 0; i < N_STATISTICS; ++i)
                if (statistics[i].wanted)
                    touch_file(directory, statistics[i].name);

            log_statistics(cgroup->name);
            cgroup->logged = true;
        } else if (errno != ENOENT)
            die("open", cgroup->name);
    }

    const bool deleted = rmdir(cgroup->name) == 0;
    if (!deleted && errno != EBUSY && errno != ENOENT)
        die("delete", cgroup->name);
    const bool busy = !deleted && errno == EBUSY;

    if (directory >= 0)
        close(directory);
    if (busy)
        return false;

    /* The kernel keeps them although the cgroup is gone. */
    inotify_rm_watch(inotify_fd, cgroup->directory_watch);
    inotify_rm_watch(inotify_fd, cgroup->events_watch);

    released += deleted;
    return true;
}

static void release_due(void)
{
    const int64_t time = now();

    if (flush && first != NULL && first->due <= time)
        touch_file(AT_FDCWD, "cpu.stat");

    for (int i = 0; i < RELEASE_BATCH && first != NULL && first->due <= time; ++i) {
        struct cgroup *const cgroup = dequeue();
        if (release(cgroup))
            free(cgroup);
        else
            enqueue(cgroup, time);
    }
}

/* Returns false at the end of the input. */
static bool read_names(void)
{
    static char buffer[64 * 1024];
    static size_t length;

    const ssize_t n = read(STDIN_FILENO, buffer + length, sizeof(buffer) - length);
    if (n < 0)
        die("read", "standard input");
    if (n == 0)
        return false;
    length += (size_t)n;

    const int64_t time = now();
    char *line = buffer;
    for (char *end; (end = memchr(line, '\n', length)) != NULL; line = end + 1) {
        length -= (size_t)(end + 1 - line);
        *end = '\0';
        watch(line, (size_t)(end - line), time);
    }

    if (length == sizeof(buffer)) {
        errno = ENAMETOOLONG;
        die("read", "standard input");
    }
    memmove(buffer, line, length);
    return true;
}

/* Only to keep the queue from overflowing, which would save the kernel some of the work. */
static void drain_events(void)
{
    static char buffer[64 * 1024];

    if (read(inotify_fd, buffer, sizeof(buffer)) < 0 && errno != EAGAIN)
        die("read", "inotify events");
}

/* In milliseconds for poll(), rounded up lest it wakes us too early; -1 for no limit. */
static int timeout(void)
{
    if (first == NULL)
        return -1;
    const int64_t rest = first->due - now();
    return rest > 0 ? (int)((rest + 999999) / 1000000) : 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--help") == 0) {
        fputs(usage, stdout);
        return EXIT_SUCCESS;
    }
    flush = argc == 3 && strcmp(argv[1], "--flush") == 0;
    if (argc != 2 && !flush) {
        fputs(usage, stderr);
        return EXIT_FAILURE;
    }

    /* All paths below are relative: the shorter, the faster. */
    const char *const scope = argv[argc - 1];
    if (chdir(scope) < 0)
        die("enter", scope);
    choose_controllers();
    inotify_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (inotify_fd < 0)
        die("create", "inotify descriptor");

    bool reading = true;
    while (reading || first != NULL) {
        struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
        const int ready = poll(&input, reading, timeout());
        if (ready < 0)
            die("poll", "standard input");

        if (ready > 0)
            reading = read_names();
        drain_events();
        release_due();
    }

    struct rusage self;
    getrusage(RUSAGE_SELF, &self);
    fprintf(stderr, "{\"released\": %lu, \"user\": %ld.%06ld, \"system\": %ld.%06ld}\n", released,
            (long)self.ru_utime.tv_sec, (long)self.ru_utime.tv_usec, (long)self.ru_stime.tv_sec,
            (long)self.ru_stime.tv_usec);
    return EXIT_SUCCESS;
}
