/*
 * The floor of the accessory benchmarks: the bare system calls with which namespaces are made and
 * handed out, in a bare loop.  What a real daemon costs above this is its own.
 *
 * usage: accessory_floor KINDS new|same|epoll INIT
 *
 * Standard input is a listening socket.  Each datagram, which is not looked at, is answered with
 * KINDS: i for an IPC, p for a PID, u for a user namespace, l for a lease.  They are made each time
 * and kept, as a daemon does; with "same" and "epoll" made at the first request and given again and
 * again.  "epoll" serves all connections at a time, else one is served after the other.  INIT
 * becomes the first process of each PID namespace.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LISTENER = STDIN_FILENO, DATAGRAM_MAX = 4096, KINDS_MAX = 4, EVENTS_MAX = 64 };

static const char *kinds, *init;
static bool same;
static int own_ipc;
static char stack[64 * 1024] __attribute__((aligned(16))); /* of one child at a time */

/* Returns what a system call returned, unless it failed. */
static int check(int result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "accessory_floor: %s: %s\n", what, strerror(errno));
        exit(EXIT_FAILURE);
    }
    return result;
}

static int open_of(pid_t pid, const char *name, int flags)
{
    char path[64];

    snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
    return check(open(path, flags | O_CLOEXEC), path);
}

static int make_ipc(void)
{
    check(unshare(CLONE_NEWIPC), "unshare");
    const int fd = check(open("/proc/self/ns/ipc", O_RDONLY | O_CLOEXEC), "open");
    check(setns(own_ipc, CLONE_NEWIPC), "setns");
    return fd;
}

static int wait_to_be_killed(void *argument)
{
    for (;; (void)argument)
        pause();
    return 0;
}

static void write_map(pid_t pid, const char *name)
{
    static const char map[] = "0 100000 65536";
    const int fd = open_of(pid, name, O_WRONLY);

    check(write(fd, map, sizeof(map) - 1), name);
    close(fd);
}

static int make_user(void)
{
    const int flags = CLONE_VM | CLONE_FILES | CLONE_NEWUSER | SIGCHLD;
    const pid_t pid = check(clone(wait_to_be_killed, stack + sizeof(stack), flags, NULL), "clone");

    write_map(pid, "uid_map");
    write_map(pid, "gid_map");
    const int fd = open_of(pid, "ns/user", O_RDONLY);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    return fd;
}

static int become_init(void *argument)
{
    char *const arguments[] = {"init-floor", NULL}, *const environment[] = {NULL};

    (void)argument;
    /* Leaves the large table of descriptors to us. */
    if (close_range(0, ~0U, CLOSE_RANGE_UNSHARE) == 0)
        execve(init, arguments, environment);
    _exit(EXIT_FAILURE);
}

/* The pidfd stays open. */
static int make_pid(void)
{
    const int flags = CLONE_VM | CLONE_VFORK | CLONE_FILES | CLONE_NEWPID | CLONE_PIDFD | SIGCHLD;
    int pidfd;

    const pid_t pid = clone(become_init, stack + sizeof(stack), flags, NULL, &pidfd);
    return open_of(check(pid, "clone"), "ns/pid", O_RDONLY);
}

/* The read end stays open. */
static int make_lease(void)
{
    int ends[2];

    check(pipe2(ends, O_CLOEXEC), "pipe2");
    return ends[1];
}

static int make(char kind)
{
    switch (kind) {
    case 'i':
        return make_ipc();
    case 'p':
        return make_pid();
    case 'u':
        return make_user();
    default:
        return make_lease();
    }
}

static void answer(int fd)
{
    /* The asker does not look at the checksum. */
    static const uint32_t datagram[] = {
        0x63046173, 0, 1 << 16 | 12, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWUSER,
    };
    static int descriptors[KINDS_MAX];
    static bool made;
    union {
        struct cmsghdr align;
        char data[CMSG_SPACE(sizeof(descriptors))];
    } control;
    const size_t count = strlen(kinds);
    struct iovec part = {(void *)datagram, sizeof(datagram)};
    struct msghdr msg = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                         .msg_controllen = CMSG_SPACE(count * sizeof(int))};

    for (size_t i = 0; i < count && !(made && same); ++i)
        descriptors[i] = make(kinds[i]);
    made = true;
    struct cmsghdr *const cmsg = CMSG_FIRSTHDR(&msg);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(cmsg), descriptors, count * sizeof(int));
    check(sendmsg(fd, &msg, MSG_NOSIGNAL), "sendmsg");
    if (kinds[count - 1] == 'l')
        close(descriptors[count - 1]);
}

/* Returns false at the end of the connection. */
static bool serve(int fd)
{
    char datagram[DATAGRAM_MAX];
    struct iovec part = {datagram, sizeof(datagram)};
    struct msghdr msg = {.msg_iov = &part, .msg_iovlen = 1};
    const bool asked = recvmsg(fd, &msg, 0) > 0;

    if (asked)
        answer(fd);
    else
        close(fd);
    return asked;
}

static int accept_one(void)
{
    return check(accept4(LISTENER, NULL, NULL, SOCK_CLOEXEC), "accept4");
}

static _Noreturn void serve_all(void)
{
    struct epoll_event events[EVENTS_MAX], event = {.events = EPOLLIN, .data.fd = LISTENER};
    const int epoll = check(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");

    check(epoll_ctl(epoll, EPOLL_CTL_ADD, LISTENER, &event), "epoll_ctl");
    for (;;) {
        const int ready = epoll_wait(epoll, events, EVENTS_MAX, -1);
        for (int i = 0; i < ready; ++i)
            if (events[i].data.fd == LISTENER) {
                event.data.fd = accept_one();
                check(epoll_ctl(epoll, EPOLL_CTL_ADD, event.data.fd, &event), "epoll_ctl");
            } else
                serve(events[i].data.fd);
    }
}

int main(int argc, char **argv)
{
    struct rlimit limit;

    if (argc != 4 || strlen(argv[1]) > KINDS_MAX) {
        fputs("accessory_floor: wrong usage: see accessory_floor.c\n", stderr);
        return EXIT_FAILURE;
    }
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    kinds = argv[1];
    same = strcmp(argv[2], "new") != 0;
    init = argv[3];
    own_ipc = check(open("/proc/self/ns/ipc", O_RDONLY | O_CLOEXEC), "open");

    if (strcmp(argv[2], "epoll") == 0)
        serve_all();
    for (;;)
        for (const int fd = accept_one(); serve(fd);)
            ;
}
