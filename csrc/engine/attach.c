#include "attach.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>

#include "ask.h"
#include "blackout.h"
#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "error.h"
#include "link.h"
#include "tpm.h"

enum {
    NOBODY = -1,
    FOREVER = -1,
    ACCEPT_RETRY_MS = 1000, /* where descriptors have run out */
};

enum state {
    SERVING,
    ENDING,
    ENDED,
};

/* What is waited for, by its place. */
enum {
    SIGNAL,
    SERVED,
    LINK,
    LANE,
    N_WAITED_FOR,
};

struct serving {
    const struct attach *attach;
    enum state state;
    int vtpmd_fd; /* the asker's, or NOBODY */
    int64_t deadline_ms;
    struct pollfd entries[N_WAITED_FOR];
};

/* sandbox: accept4 */
static void take_vtpmd(struct serving *serving)
{
    struct link *link = serving->attach->link;
    int fd = accept4(serving->attach->listening_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

    if (fd < 0) {
        bool has_run_out = errno == EMFILE || errno == ENFILE || errno == ENOMEM;
        serving->deadline_ms = has_run_out ? clock_ms() + ACCEPT_RETRY_MS : FOREVER;
        return;
    }
    /* What another has had written is all that it finds in the owner record. */
    blackout_wait_for_record(link->blackout);
    link_greet(fd); /* before all else that is said; who is gone already is seen to be */
    asker_attach(link->asker, fd);
    serving->vtpmd_fd = fd;
}

static void lose_vtpmd(struct serving *serving)
{
    asker_detach(serving->attach->link->asker);
    blackout_say(serving->attach->link->blackout, HANDOVER_DETACHED);
    tpm_arm(serving->attach->link->tpm, false); /* who comes next says so again */
    serving->vtpmd_fd = NOBODY;
    if (serving->state == ENDING)
        serving->state = ENDED;
}

static void serve_vtpmd(struct serving *serving)
{
    int r = link_serve(serving->attach->link, serving->vtpmd_fd);

    if (r == LINK_ENDING)
        serving->state = ENDED;
    if (r < 0)
        error_report("vtpmd is attached no more: what it says cannot be taken (%s); the guest is "
                     "served on: attach one that goes with this engine",
                     strerror(-r));
    if (r < 0 || r == LINK_GONE)
        lose_vtpmd(serving);
}

/* The vTPM is to end: vtpmd has sessions to end first, if one is there. */
static void begin_to_end(struct serving *serving)
{
    if (serving->state != SERVING)
        return;
    serving->state = serving->vtpmd_fd == NOBODY ? ENDED : ENDING;
    serving->deadline_ms = clock_ms() + LINK_END_TIMEOUT_MS;
}

/* Return false at the deadline.
 * sandbox: poll|ppoll restart_syscall=EINTR */
static bool wait_for_event(struct serving *serving)
{
    bool has_vtpmd = serving->vtpmd_fd != NOBODY;

    serving->entries[LANE].fd = blackout_lane_fd(serving->attach->link->blackout);
    serving->entries[LINK].fd = has_vtpmd ? serving->vtpmd_fd : serving->attach->listening_fd;
    for (;;) {
        int64_t left_ms = FOREVER;
        if (serving->deadline_ms != FOREVER)
            left_ms = serving->deadline_ms - clock_ms();
        if (serving->deadline_ms != FOREVER && left_ms <= 0)
            return false;
        int n = poll(serving->entries, N_WAITED_FOR, (int)left_ms);
        if (n > 0)
            return true;
        check(n == 0 || errno == EINTR);
    }
}

static void take_event(struct serving *serving)
{
    struct pollfd *entries = serving->entries;

    if (entries[SIGNAL].revents) {
        entries[SIGNAL].fd = NOBODY; /* once is enough */
        asker_tell(serving->attach->link->asker, LINK_TELL_SIGNAL, 0, NULL, 0);
        begin_to_end(serving);
    }
    if (entries[SERVED].revents) {
        entries[SERVED].fd = NOBODY;
        begin_to_end(serving);
    }
    if (entries[LANE].revents)
        blackout_receive(serving->attach->link->blackout);
    if (!entries[LINK].revents || serving->state == ENDED)
        return;
    if (serving->vtpmd_fd == NOBODY)
        take_vtpmd(serving);
    else
        serve_vtpmd(serving);
}

void attach_run(struct attach *attach)
{
    struct serving serving = {
        .attach = attach,
        .vtpmd_fd = NOBODY,
        .deadline_ms = FOREVER,
        .entries =
            {
                [SIGNAL] = {attach->signal_fd, POLLIN, 0},
                [SERVED] = {attach->served_fd, POLLIN, 0},
                [LINK] = {NOBODY, POLLIN, 0},
                [LANE] = {NOBODY, POLLIN, 0},
            },
    };

    while (serving.state != ENDED) {
        if (wait_for_event(&serving))
            take_event(&serving);
        else if (serving.state == ENDING)
            serving.state = ENDED;
        else
            serving.deadline_ms = FOREVER;
    }
}
