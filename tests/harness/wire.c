/* A wire between two network namespaces: copies Ethernet frames between a TAP device in each, with
 * a rate, a delay, jitter and loss, and can be cut.
 *
 *   wire CONTROL NAMESPACE-A NAMESPACE-B DEVICE SEED
 *
 * It makes DEVICE in both namespaces (paths, as in /run/netns) and takes commands on the UNIX
 * socket CONTROL, one client at a time. A command is a line, and so is its answer, `ok` or `error`;
 * when it is answered it is in force. All hold for both ways.
 *
 *   rate N        bits a second
 *   delay N       µs, one way
 *   jitter N      µs that the delay may be longer or shorter; frames keep their order
 *   loss N        frames in a million, drawn from a generator that SEED begins
 *   cut           no carrier; nothing gets through, and nothing that was on its way does
 *   drop a|b      frames to that side are lost, and nobody is told
 *   restore       ends both
 *   count         answers `ok`, then for frames to a and to b: how many got through, how many not
 */
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    FRAME_BYTES_MAX = 1518, /* Ethernet's MTU of 1500, a header and a VLAN tag */
    FRAMES_MAX = 1 << 14,   /* on their way to one side: 0.19 s at 1 Gbit/s */
    BATCH_MAX = 64,         /* frames read before the other way has its turn */
    LINE_BYTES_MAX = 64,    /* of a command */
    ONE_MILLION = 1000000,
    NS_A_US = 1000,
};
#define NS_A_SECOND UINT64_C(1000000000)

/* What a router's buffer holds; what comes then is dropped. */
#define QUEUE_NS_MAX UINT64_C(50000000)

struct frame {
    uint64_t due_ns;
    size_t bytes;
    uint8_t data[FRAME_BYTES_MAX];
};

struct direction {
    int from, to;
    bool drops;
    uint64_t idle_ns; /* when what was sent before has left */
    uint64_t due_ns;  /* when the last frame arrives */
    struct frame *ring;
    size_t first, end; /* count up; the place in the ring is modulo FRAMES_MAX */
    uint64_t forwarded, dropped;
};

struct wire {
    struct direction to_a, to_b;
    uint64_t rate_bits_s, delay_ns, jitter_ns, loss_ppm, random;
    bool is_cut;
};

struct control {
    int listener, client;
    char line[LINE_BYTES_MAX];
    size_t bytes;
};

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_A_SECOND + (uint64_t)now.tv_nsec;
}

static int failed(const char *what)
{
    fprintf(stderr, "wire: %s: %s\n", what, strerror(errno));
    return 1;
}

/* splitmix64 */
static uint64_t draw(struct wire *wire, uint64_t below)
{
    uint64_t x = wire->random += 0x9e3779b97f4a7c15;

    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return (x ^ (x >> 31)) % below;
}

/* Open a TAP device in another namespace: the device is where the process was when it opened it. */
static int open_tap(const char *namespace, const char *device)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    int there = open(namespace, O_RDONLY | O_CLOEXEC), tap = -1;

    if (home < 0 || there < 0 || setns(there, CLONE_NEWNET) < 0)
        return -1;
    snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", device);
    tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tap < 0 || ioctl(tap, TUNSETIFF, &request) < 0 || setns(home, CLONE_NEWNET) < 0)
        return -1;
    close(home);
    close(there);
    return tap;
}

static int open_control(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 ||
        listen(listener, 1) < 0)
        return -1;
    return listener;
}

/* Decide what becomes of a frame that was read into the ring's free place. */
static void schedule(struct wire *wire, struct direction *direction, struct frame *frame)
{
    uint64_t now = now_ns(), jitter_ns = 0;
    bool lost = wire->loss_ppm > 0 && draw(wire, ONE_MILLION) < wire->loss_ppm;

    if (direction->idle_ns < now)
        direction->idle_ns = now;
    if (lost || wire->is_cut || direction->drops || direction->idle_ns - now > QUEUE_NS_MAX ||
        direction->end - direction->first == FRAMES_MAX - 1) {
        direction->dropped++;
        return;
    }
    direction->idle_ns += frame->bytes * 8 * NS_A_SECOND / wire->rate_bits_s;
    if (wire->jitter_ns > 0)
        jitter_ns = draw(wire, 2 * wire->jitter_ns);
    frame->due_ns = direction->idle_ns + wire->delay_ns + jitter_ns - wire->jitter_ns;
    if (frame->due_ns < direction->due_ns)
        frame->due_ns = direction->due_ns;
    direction->due_ns = frame->due_ns;
    direction->end++;
}

static void take_frames(struct wire *wire, struct direction *direction)
{
    for (int i = 0; i < BATCH_MAX; i++) {
        struct frame *frame = &direction->ring[direction->end % FRAMES_MAX];
        ssize_t bytes = read(direction->from, frame->data, sizeof(frame->data));

        if (bytes < 0)
            return; /* no more for now, or the device is down */
        frame->bytes = (size_t)bytes;
        schedule(wire, direction, frame);
    }
}

/* Deliver what is due; return when the next one is, UINT64_MAX without one. */
static uint64_t give_frames(struct direction *direction)
{
    uint64_t now = now_ns();

    while (direction->first != direction->end) {
        const struct frame *frame = &direction->ring[direction->first % FRAMES_MAX];

        if (frame->due_ns > now)
            return frame->due_ns;
        if (write(direction->to, frame->data, frame->bytes) < 0)
            direction->dropped++; /* the other device is down */
        else
            direction->forwarded++;
        direction->first++;
    }
    return UINT64_MAX;
}

static void lose_all(struct direction *direction)
{
    direction->dropped += direction->end - direction->first;
    direction->first = direction->end;
}

static void set_cut(struct wire *wire, bool is_cut)
{
    int carrier = !is_cut;

    wire->is_cut = is_cut;
    check(ioctl(wire->to_a.to, TUNSETCARRIER, &carrier) == 0);
    check(ioctl(wire->to_b.to, TUNSETCARRIER, &carrier) == 0);
    if (is_cut) {
        lose_all(&wire->to_a);
        lose_all(&wire->to_b);
    }
}

static void drop(struct direction *direction)
{
    direction->drops = true;
    lose_all(direction);
}

static bool set_number(struct wire *wire, const char *name, uint64_t number)
{
    if (strcmp(name, "rate") == 0 && number > 0)
        wire->rate_bits_s = number;
    else if (strcmp(name, "delay") == 0 && number * NS_A_US >= wire->jitter_ns)
        wire->delay_ns = number * NS_A_US;
    else if (strcmp(name, "jitter") == 0 && number * NS_A_US <= wire->delay_ns)
        wire->jitter_ns = number * NS_A_US;
    else if (strcmp(name, "loss") == 0 && number <= ONE_MILLION)
        wire->loss_ppm = number;
    else
        return false;
    return true;
}

static bool obey(struct wire *wire, const char *line)
{
    char name[LINE_BYTES_MAX], side, rest;
    uint64_t number;

    if (sscanf(line, "%s %" SCNu64 " %c", name, &number, &rest) == 2)
        return set_number(wire, name, number);
    if (sscanf(line, "drop %c %c", &side, &rest) == 1 && (side == 'a' || side == 'b')) {
        drop(side == 'a' ? &wire->to_a : &wire->to_b);
        return true;
    }
    if (strcmp(line, "restore") == 0)
        wire->to_a.drops = wire->to_b.drops = false;
    else if (strcmp(line, "cut") != 0)
        return strcmp(line, "count") == 0;
    set_cut(wire, *line == 'c');
    return true;
}

static void answer(struct wire *wire, int client, const char *line)
{
    const struct direction *a = &wire->to_a, *b = &wire->to_b;

    if (!obey(wire, line))
        dprintf(client, "error\n");
    else if (strcmp(line, "count") == 0)
        dprintf(client, "ok %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", a->forwarded,
                a->dropped, b->forwarded, b->dropped);
    else
        dprintf(client, "ok\n");
}

static void hang_up(struct control *control)
{
    close(control->client);
    control->client = -1;
    control->bytes = 0;
}

/* Read what the client has sent, and obey each line that it completes. */
static void take_commands(struct wire *wire, struct control *control)
{
    size_t room = sizeof(control->line) - control->bytes;
    ssize_t bytes = read(control->client, control->line + control->bytes, room);
    char *end;

    if (bytes <= 0) {
        hang_up(control);
        return;
    }
    control->bytes += (size_t)bytes;
    while ((end = memchr(control->line, '\n', control->bytes)) != NULL) {
        size_t used = (size_t)(end - control->line) + 1;

        *end = '\0';
        answer(wire, control->client, control->line);
        control->bytes -= used;
        memmove(control->line, end + 1, control->bytes);
    }
    if (control->bytes == sizeof(control->line))
        hang_up(control); /* no command is as long */
}

static void serve(struct wire *wire, struct control *control)
{
    uint64_t due_a = UINT64_MAX, due_b = UINT64_MAX;

    for (;;) {
        uint64_t now = now_ns(), due = due_a < due_b ? due_a : due_b;
        uint64_t wait_ns = due > now ? due - now : 0;
        struct timespec wait = {.tv_sec = (time_t)(wait_ns / NS_A_SECOND),
                                .tv_nsec = (long)(wait_ns % NS_A_SECOND)};
        bool listens = control->client < 0;
        struct pollfd polled[] = {
            {.fd = listens ? control->listener : control->client, .events = POLLIN},
            {.fd = wire->to_b.from, .events = POLLIN},
            {.fd = wire->to_a.from, .events = POLLIN},
        };

        check(ppoll(polled, 3, due == UINT64_MAX ? NULL : &wait, NULL) >= 0);
        if (polled[0].revents && listens)
            control->client = accept4(control->listener, NULL, NULL, SOCK_CLOEXEC);
        else if (polled[0].revents)
            take_commands(wire, control);
        take_frames(wire, &wire->to_b);
        take_frames(wire, &wire->to_a);
        due_b = give_frames(&wire->to_b);
        due_a = give_frames(&wire->to_a);
    }
}

int main(int argc, char **argv)
{
    struct wire wire = {.rate_bits_s = NS_A_SECOND};
    struct control control = {.client = -1};

    if (argc != 6) {
        fprintf(stderr, "usage: wire CONTROL NAMESPACE-A NAMESPACE-B DEVICE SEED\n");
        return 2;
    }
    wire.random = strtoull(argv[5], NULL, 10);
    wire.to_b.from = wire.to_a.to = open_tap(argv[2], argv[4]);
    wire.to_a.from = wire.to_b.to = open_tap(argv[3], argv[4]);
    if (wire.to_b.from < 0 || wire.to_a.from < 0)
        return failed("cannot make the TAP devices");
    wire.to_a.ring = calloc(FRAMES_MAX, sizeof(struct frame));
    wire.to_b.ring = calloc(FRAMES_MAX, sizeof(struct frame));
    if (wire.to_a.ring == NULL || wire.to_b.ring == NULL)
        return failed("no memory for frames");
    control.listener = open_control(argv[1]);
    if (control.listener < 0)
        return failed(argv[1]);
    serve(&wire, &control);
}
