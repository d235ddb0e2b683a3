// Holds the accessory daemon's namespaces while the daemon is restarted, and makes those that need a
// program of their own: PID namespaces with their inits, mount and time namespaces.
//
// Called as: cm4all-spawn-keeper INIT ADDRESS, with a SOCK_SEQPACKET socket as descriptor 0. INIT is
// the program that becomes the first process of each PID namespace. When nobody holds the other end
// of the socket any more, all namespaces end: neither a daemon nor a service manager knows of them.
//
// A message is a header, text, and descriptors. What is kept is a record: the message's text and up to
// two descriptors, in a slot that the daemon chose. The text of a namespace or lease is its NAME; that
// of a user namespace goes on with NUL, uid map, NUL, gid map. See records.py and keeper.py for
// the other side.
//
// The daemon gets the sending end of a second socket, for records. They are safe as soon as they are in
// its queue, since both ends are ours; so nobody is woken up by them, and they are read only before the
// next message on the first socket.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum operation {
	HOLD = 1, // keep the descriptors in this message
	MAKE = 2, // make a namespace, keep it and send it back
	DROP = 3, // forget a record; ends the init of a PID namespace
	ALL = 4,  // send all records as HOLD, then this message: the end of the queue, as slot how many
		  // descriptors we may have, and as kind which version of all this we speak
	READ = 5, // read the queue
};

struct header {
	uint32_t operation;
	uint32_t kind; // CLONE_NEW* of a namespace, 0 for a lease
	uint32_t slot;
	int32_t error; // why MAKE failed (errno)
	uint64_t since; // tells the records that have the same slot one after the other apart
};

enum { VERSION = 1 }; // we may be older than the daemon: it was upgraded

enum { SOCKET = 0, TEXT_MAX = 8192, DESCRIPTORS_MAX = 2, SLOTS_MAX = 1 << 24 };

struct message {
	struct header header;
	char text[TEXT_MAX + 1];
	size_t length;
	int descriptors[DESCRIPTORS_MAX]; // of a PID namespace: itself, and the pidfd of its init
	int count;
};

struct record {
	struct header header;
	char *text; // NULL in a free slot
	size_t length;
	int descriptors[DESCRIPTORS_MAX];
	int count;
};

static int queue[2]; // its receiving and its sending end
static struct record *records;
static size_t n_records;
static char *init_path, *address;
static char stack[64 * 1024] __attribute__((aligned(16))); // of the one child that shares our memory

// Records

static void forget(struct record *record)
{
	if (record->header.kind == CLONE_NEWPID && record->count == 2)
		syscall(SYS_pidfd_send_signal, record->descriptors[1], SIGKILL, NULL, 0);
	for (int i = 0; i < record->count; i++)
		close(record->descriptors[i]);
	free(record->text);
	memset(record, 0, sizeof *record);
}

// Returns an errno.
static int keep(const struct message *message)
{
	const size_t slot = message->header.slot;
	if (slot >= SLOTS_MAX)
		return EINVAL;
	if (slot >= n_records) {
		const size_t n = slot + slot / 2 + 64;
		struct record *larger = reallocarray(records, n, sizeof *records);
		if (larger == NULL)
			return ENOMEM;
		memset(larger + n_records, 0, (n - n_records) * sizeof *records);
		records = larger;
		n_records = n;
	}
	// MAKE may have waited for us so long that its slot was given to another one.
	if (records[slot].text != NULL && records[slot].header.since > message->header.since)
		return ESTALE;
	char *text = malloc(message->length + 1);
	if (text == NULL)
		return ENOMEM;
	memcpy(text, message->text, message->length);
	if (records[slot].text != NULL)
		forget(&records[slot]);
	records[slot] = (struct record){ .header = message->header, .text = text, .length = message->length,
					 .count = message->count };
	memcpy(records[slot].descriptors, message->descriptors, sizeof message->descriptors);
	return 0;
}

// Making namespaces

struct child {
	unsigned flag;
	char **argv;
	int error;
	int descriptor;
};

static int become_init(void *argument)
{
	struct child *child = argument;
	char *environment[] = { NULL };
	// One that comes before INIT waits for it would be lost.
	sigset_t term;
	sigemptyset(&term);
	sigaddset(&term, SIGTERM);
	sigprocmask(SIG_BLOCK, &term, NULL);
	signal(SIGCHLD, SIG_DFL);
	setsid();
	// A descriptor table of its own, without copying ours, which is large.
	if (close_range(0, ~0U, CLOSE_RANGE_UNSHARE) == 0)
		execve(init_path, child->argv, environment);
	child->error = errno;
	_exit(1);
}

static int open_mount_or_time(void *argument)
{
	struct child *child = argument;
	const bool mounts = child->flag == CLONE_NEWNS;
	if (unshare(child->flag) == 0 && (!mounts || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0))
		// Our table of descriptors, too.
		child->descriptor = open(mounts ? "/proc/self/ns/mnt" : "/proc/self/ns/time_for_children",
					 O_RDONLY | O_CLOEXEC);
	child->error = child->descriptor < 0 ? errno : 0;
	_exit(0);
}

static int open_pid_namespace(pid_t pid)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/ns/pid", pid);
	return open(path, O_RDONLY | O_CLOEXEC);
}

static int make_pid(struct message *message)
{
	char name[sizeof "init-" + TEXT_MAX];
	snprintf(name, sizeof name, "init-%s", message->text);
	char *argv[] = { name, address, NULL };
	struct child child = { .argv = argv };
	int pidfd = -1;
	// It shares our memory until it executes INIT, and nobody else can see it yet.
	const pid_t pid = clone(become_init, stack + sizeof stack,
				CLONE_VM | CLONE_VFORK | CLONE_FILES | CLONE_NEWPID | CLONE_PIDFD | SIGCHLD,
				&child, &pidfd);
	if (pid < 0)
		return errno;
	const int namespace = child.error == 0 ? open_pid_namespace(pid) : -1;
	if (namespace < 0) {
		const int error = child.error != 0 ? child.error : errno;
		syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
		close(pidfd);
		return error;
	}
	message->descriptors[0] = namespace;
	message->descriptors[1] = pidfd;
	message->count = 2;
	return 0;
}

static int make_mount_or_time(struct message *message)
{
	struct child child = { .flag = message->header.kind, .descriptor = -1, .error = EIO };
	const pid_t pid = clone(open_mount_or_time, stack + sizeof stack,
				CLONE_VM | CLONE_VFORK | CLONE_FILES | SIGCHLD, &child);
	if (pid < 0)
		return errno;
	if (child.descriptor >= 0) {
		message->descriptors[0] = child.descriptor;
		message->count = 1;
	}
	return child.error;
}

static int make(struct message *message)
{
	switch (message->header.kind) {
	case CLONE_NEWPID:
		return make_pid(message);
	case CLONE_NEWNS:
	case CLONE_NEWTIME:
		return make_mount_or_time(message);
	default:
		return EINVAL;
	}
}

// Messages

static void close_all(const struct message *message)
{
	for (int i = 0; i < message->count; i++)
		close(message->descriptors[i]);
}

// Returns whether there is one; if not, nobody holds the other end any more.
static bool receive(int fd, int flags, struct message *message)
{
	union {
		struct cmsghdr align;
		char data[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
	} control;
	struct iovec parts[] = { { &message->header, sizeof message->header }, { message->text, TEXT_MAX } };
	struct msghdr msg = { .msg_iov = parts, .msg_iovlen = 2, .msg_control = &control,
			      .msg_controllen = sizeof control };
	ssize_t size;
	while ((size = recvmsg(fd, &msg, MSG_CMSG_CLOEXEC | flags)) < 0)
		if (errno != EINTR)
			return false;
	if (size < (ssize_t)sizeof message->header)
		return false;
	message->length = size - sizeof message->header;
	message->text[message->length] = '\0';
	message->count = 0;
	const struct cmsghdr *const cmsg = CMSG_FIRSTHDR(&msg);
	if (cmsg != NULL && cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS) {
		message->count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(message->descriptors, CMSG_DATA(cmsg), message->count * sizeof(int));
	}
	if (msg.msg_flags & MSG_CTRUNC) { // we have no room for more: half of a record is of no use
		close_all(message);
		message->count = 0;
	}
	return true;
}

// Returns an errno.
static int reply(const struct header *header, const char *text, size_t length, const int *descriptors, int count)
{
	union {
		struct cmsghdr align;
		char data[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
	} control = { 0 };
	struct iovec parts[] = { { (void *)header, sizeof *header }, { (void *)text, length } };
	struct msghdr msg = { .msg_iov = parts, .msg_iovlen = 2 };
	if (count > 0) {
		msg.msg_control = &control;
		msg.msg_controllen = CMSG_SPACE(count * sizeof(int));
		struct cmsghdr *const cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(count * sizeof(int));
		memcpy(CMSG_DATA(cmsg), descriptors, count * sizeof(int));
	}
	while (sendmsg(SOCKET, &msg, MSG_NOSIGNAL) < 0)
		if (errno != EINTR)
			return errno;
	return 0;
}

static void hold(const struct message *message)
{
	if (message->count == 0 || keep(message) != 0)
		close_all(message);
}

static void make_and_send(struct message *message)
{
	int error = make(message);
	if (error == 0)
		error = keep(message);
	if (error != 0) {
		if (message->count == 2)
			syscall(SYS_pidfd_send_signal, message->descriptors[1], SIGKILL, NULL, 0);
		close_all(message);
		message->count = 0;
	}
	message->header.error = error;
	reply(&message->header, NULL, 0, message->descriptors, message->count);
}

static void send_all(struct message *message)
{
	for (const struct record *i = records; i < records + n_records; i++) {
		struct header header = i->header;
		header.operation = HOLD;
		if (i->text != NULL)
			reply(&header, i->text, i->length, i->descriptors, i->count);
	}
	struct rlimit limit = { 0 };
	getrlimit(RLIMIT_NOFILE, &limit);
	message->header.kind = VERSION;
	message->header.slot = limit.rlim_cur < UINT32_MAX ? limit.rlim_cur : UINT32_MAX;
	reply(&message->header, NULL, 0, &queue[1], 1);
}

static void drop(const struct message *message)
{
	const size_t slot = message->header.slot;
	if (slot < n_records && records[slot].header.since == message->header.since)
		forget(&records[slot]);
}

static void read_queue(void)
{
	static struct message message;
	while (receive(queue[0], MSG_DONTWAIT, &message))
		hold(&message);
}

static void handle(struct message *message)
{
	switch (message->header.operation) {
	case MAKE:
		make_and_send(message);
		break;
	case DROP:
		drop(message);
		break;
	case ALL:
		send_all(message);
		break;
	}
}

int main(int argc, char **argv)
{
	static struct message message;
	struct rlimit limit;
	if (argc != 3)
		return 2;
	init_path = argv[1];
	address = argv[2];
	prctl(PR_SET_NAME, "spawn-keeper");
	signal(SIGCHLD, SIG_IGN); // nobody asks how an init ended
	signal(SIGHUP, SIG_IGN);  // which is for the daemon
	if (chdir("/") < 0)
		return 1;
	if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, queue) < 0)
		return 1;
	while (receive(SOCKET, 0, &message)) {
		close_all(&message); // there are none
		message.count = 0;
		read_queue();
		handle(&message);
	}
	read_queue();
	for (size_t i = 0; i < n_records; i++)
		forget(&records[i]);
	return 0;
}
