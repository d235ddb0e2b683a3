/*
 * A client of the accessory daemon, or of accessory_floor.c: sends one request after the other, and
 * measures how long each answer takes.
 *
 * usage: asker @ADDRESS REQUESTS DESCRIPTORS LEASES SECONDS
 *
 * REQUESTS is a file: the size of a datagram (u32), the datagram, and so on.  Each is sent once, or
 * all again and again for SECONDS if that is not 0.  Each answer must have so many DESCRIPTORS, the
 * last LEASES of which are kept.  A byte on standard input, or its end, is waited for before the
 * requests, and again after the line of JSON on standard error.  Times are in microseconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    WARM_UP = 10, /* so many of the first requests do not count */
    SAMPLES_MAX = 1 << 20,
    REQUESTS_MAX = 1 << 22, /* bytes */
    DATAGRAM_MAX = 4096,
    DESCRIPTORS_MAX = 16,
    PATIENCE = 30, /* seconds */
};

static int64_t samples[SAMPLES_MAX];
static char requests[REQUESTS_MAX];

static _Noreturn void die(const char *what, const char *why)
{
    fprintf(stderr, "asker: %s: %s\n", what, why);
    exit(EXIT_FAILURE);
}

static int64_t now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static int connect_to(const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const struct timeval patience = {.tv_sec = PATIENCE};
    const size_t length = strnlen(name, sizeof(address.sun_path));
    const socklen_t size = offsetof(struct sockaddr_un, sun_path) + length;
    const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    memcpy(address.sun_path, name, length);
    address.sun_path[0] = '\0';
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, size) < 0 ||
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) < 0)
        die(name, strerror(errno));
    return fd;
}

static size_t read_requests(const char *path)
{
    FILE *const file = fopen(path, "r");
    const size_t size = file == NULL ? 0 : fread(requests, 1, sizeof(requests), file);

    if (size == 0 || size == sizeof(requests))
        die(path, "no requests, or too many");
    return size;
}

/* Returns how long it took in nanoseconds; what is done with the answer does not count. */
static int64_t ask(int fd, const char *request, uint32_t length, size_t wanted, size_t leases)
{
    union {
        struct cmsghdr align;
        char data[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
    } control;
    char answer[DATAGRAM_MAX + 1];
    struct iovec part = {answer, DATAGRAM_MAX};
    struct msghdr msg = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                         .msg_controllen = sizeof(control)};

    const int64_t started = now();
    const ssize_t sent = send(fd, request, length, MSG_NOSIGNAL);
    const ssize_t size = sent < 0 ? -1 : recvmsg(fd, &msg, MSG_CMSG_CLOEXEC);
    const int64_t taken = now() - started;

    if (size < 12)
        die("no answer", size < 0 ? strerror(errno) : "the connection was closed");
    answer[size] = '\0';
    if (answer[10] == 0) /* the command of the first packet */
        die("the answer is an error", answer + 12);
    const struct cmsghdr *const cmsg = CMSG_FIRSTHDR(&msg);
    if (cmsg == NULL || cmsg->cmsg_len != CMSG_LEN(wanted * sizeof(int)))
        die("the answer", "not as many descriptors as were asked for");
    for (size_t i = 0; i < wanted - leases; ++i)
        close(((const int *)CMSG_DATA(cmsg))[i]);
    return taken;
}

static int compare(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

static void wait_for_input(void)
{
    char byte;

    if (read(STDIN_FILENO, &byte, 1) < 0)
        die("standard input", strerror(errno));
}

int main(int argc, char **argv)
{
    struct rlimit limit;

    if (argc != 6)
        die("wrong usage", "see asker.c");
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    const int fd = connect_to(argv[1]);
    const size_t size = read_requests(argv[2]);
    const size_t wanted = atoi(argv[3]), leases = atoi(argv[4]);
    const int64_t duration = atoi(argv[5]) * INT64_C(1000000000);

    wait_for_input();
    int64_t started = now();
    size_t count = 0, position = 0;
    for (int warm = 0; count < SAMPLES_MAX && (duration == 0 || now() - started < duration);) {
        uint32_t length;
        memcpy(&length, requests + position, sizeof(length));
        samples[count] = ask(fd, requests + position + sizeof(length), length, wanted, leases);
        if (warm < WARM_UP) {
            ++warm;
            started = now();
        } else
            ++count;
        position += sizeof(length) + length;
        if (position == size && duration == 0)
            break;
        position %= size;
    }
    const double taken = (now() - started) / 1e9;
    qsort(samples, count, sizeof(*samples), compare);
    fprintf(stderr, "{\"requests\": %zu, \"seconds\": %.6f, \"median\": %.3f}\n", count, taken,
            samples[count / 2] / 1e3);
    wait_for_input();
    return EXIT_SUCCESS;
}
