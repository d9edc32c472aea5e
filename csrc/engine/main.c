/* vtpmd-engine: one vTPM, in a process of its own.
 *
 * Started by vtpmd with the descriptors of enum link_descriptor: it opens no path and no network.
 * This thread serves vtpmd, if one is there, and sees signals (attach.c); one serves QEMU
 * (server.c). Other threads serve the guest (data.c), execute what may be long (long_command.c),
 * fold the journal (fold.c), and see whether the storage stalls (watchdog.c).
 *
 * `vtpmd-engine info VERSION FLAGS` and `vtpmd-engine make VERSION` serve nothing: they ask
 * libtpms (inquiry.h). `vtpmd-engine chroot UID` has LINK_FD_ROOT as its root directory, and is
 * that user, before it does anything.
 *
 * Exit status: enum exit_status.
 */
#include <errno.h>
#include <openssl/crypto.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ask.h"
#include "attach.h"
#include "blackout.h"
#include "check.h"
#include "data.h"
#include "error.h"
#include "holder.h"
#include "inquiry.h"
#include "io.h"
#include "linear.h"
#include "link.h"
#include "pages.h"
#include "sandbox.h"
#include "server.h"
#include "slice.h"
#include "thread.h"
#include "tpm.h"
#include "watchdog.h"
#include "wipe.h"

enum exit_status {
    EXIT_STOPPED = 0, /* by QEMU, by a signal, or by vtpmd */
    EXIT_FAILED = 1,  /* set-up failed */
    EXIT_USAGE = 2,   /* it was not started by vtpmd */
    EXIT_JOURNAL = 7, /* stopped, but swtpm cannot take the directory: a journal is left */
    EXIT_REMOVED = 9, /* stopped, and the directory was removed meanwhile, or what is in it */
};

enum {
    SERVER_STACK_BYTES = 1 << 20, /* libtpms keeps a copy of its NV memory on the stack */
};

struct engine {
    struct io_posix io;
    struct linear linear; /* over that, where there is no directory */
    struct watchdog *watchdog;
    struct tpm *tpm;
    struct data_channel *channel;
    pthread_t server_thread;
    pthread_mutex_t gate; /* held until it is known whether clients are served */
    bool may_serve;
    struct link link;
    struct attach attach;
};

static bool is_socket(int fd)
{
    struct stat status;

    return fstat(fd, &status) == 0 && S_ISSOCK(status.st_mode);
}

/* Where the state is: a directory, or in a linear file or block device; or 0. */
static mode_t kind_of_place(void)
{
    struct stat status;

    return fstat(LINK_FD_DIRECTORY, &status) == 0 ? status.st_mode & S_IFMT : 0;
}

static bool is_started_by_vtpmd(void)
{
    mode_t kind = kind_of_place();

    return kind == S_IFDIR || (!is_socket(LINK_FD_SOCKET) && (kind == S_IFREG || kind == S_IFBLK));
}

/* nohup(1) has a terminal's end ignored. */
static bool is_ignored(int number)
{
    struct sigaction action;

    return sigaction(number, NULL, &action) == 0 && action.sa_handler == SIG_IGN;
}

/* Called before there are other threads, which block the same signals then. Returns a descriptor,
 * or a negative errno. */
static int open_signals(void)
{
    sigset_t ends;

    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    if (!is_ignored(SIGHUP))
        sigaddset(&ends, SIGHUP);
    if (sigprocmask(SIG_BLOCK, &ends, NULL) < 0)
        return -errno;
    int fd = signalfd(-1, &ends, SFD_CLOEXEC | SFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

/* Open what the threads wait for. Returns 0 or a negative errno. */
static int open_waits(struct engine *engine)
{
    struct attach *attach = &engine->attach;

    attach->link = &engine->link;
    attach->listening_fd = is_socket(LINK_FD_SOCKET) ? LINK_FD_SOCKET : -1; /* poll(2): nothing */
    attach->signal_fd = open_signals();
    if (attach->signal_fd < 0)
        return attach->signal_fd;
    attach->served_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    engine->link.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return attach->served_fd < 0 || engine->link.wake_fd < 0 ? -errno : 0;
}

static void warn_of_unlocked_memory(enum locked locked)
{
    if (locked != LOCKED_ALL)
        error_report("%s of the TPM's memory may be swapped out: RLIMIT_MEMLOCK is too low; raise "
                     "it to 64 MiB (LimitMEMLOCK=64M in a service, ulimit -l 65536 in a shell)",
                     locked == LOCKED_NOTHING ? "all" : "part");
}

/* Nothing that a client sends is looked at by a thread that may make every system call. */
static void *run_server(void *argument)
{
    struct engine *engine = argument;

    pthread_mutex_lock(&engine->gate);
    bool may_serve = engine->may_serve;
    pthread_mutex_unlock(&engine->gate);
    if (may_serve)
        server_run(engine->link.server);
    link_wake(engine->attach.served_fd);
    return NULL;
}

static int seal(void)
{
    int r = sandbox_seal();

    if (r < 0)
        error_report("cannot give up system calls: %s; the kernel needs CONFIG_SECCOMP_FILTER",
                     strerror(-r));
    return r;
}

/* Who waits for a start goes on.
 * sandbox: write close */
static void tell_of_start(const struct link_serving *serving)
{
    if (!(serving->starting & LINK_STARTING_TOLD))
        return;
    error_set_descriptor(LINK_FD_ERROR);
    if (write(LINK_FD_STARTED, "", 1) < 0)
        check(errno == EPIPE); /* it was ended */
    close(LINK_FD_STARTED);
}

static int say_boot_failed(int r)
{
    error_report("cannot start from the boot record: %s; install vtpmd again", strerror(-r));
    return r;
}

/* Returns 0 or a negative errno. */
static int begin_boot(struct link *link)
{
    enum locked locked = sandbox_lock_memory();

    int r = link_boot_begin(link, LINK_FD_BOOT);
    if (r < 0)
        return say_boot_failed(r);
    if (link->serving.starting & LINK_STARTING_SILENT) {
        dup2(LINK_FD_INPUT, LINK_FD_ERROR); /* the sealed sandbox does not allow it */
        error_set_descriptor(LINK_FD_STARTED);
    }
    warn_of_unlocked_memory(locked);
    return 0;
}

/* All threads run. What the TPM starts from is looked at by none that may make every system call.
 * Returns 0 or a negative errno. */
static int boot(struct link *link)
{
    int r = seal();

    if (r < 0)
        return r;
    r = link_boot(link, LINK_FD_BOOT);
    if (r < 0)
        return say_boot_failed(r);
    return r == LINK_NOT_ON ? -ECANCELED : 0;
}

/* Serve until the end. Returns 0 or a negative errno. */
static int serve_all(struct engine *engine)
{
    struct link *link = &engine->link;

    pthread_mutex_lock(&engine->gate);
    int r = thread_start(&engine->server_thread, SERVER_STACK_BYTES, run_server, engine);
    if (r < 0)
        return r;
    r = boot(link);
    engine->may_serve = r >= 0;
    pthread_mutex_unlock(&engine->gate);
    if (r >= 0) {
        data_channel_begin(engine->channel);
        tell_of_start(&link->serving);
        attach_run(&engine->attach);
    }
    asker_close(link->asker);
    link_wake(link->wake_fd);
    pthread_join(engine->server_thread, NULL);
    return r;
}

/* Make what serves, and end it in the order that it needs. */
static int serve_tpm(struct engine *engine)
{
    struct link *link = &engine->link;
    struct commands about = {.tpm = engine->tpm, .store = link->store};

    int r = tpm_start_long_commands(engine->tpm);
    if (r >= 0)
        r = asker_new(&link->asker);
    if (r >= 0)
        r = blackout_new(&link->blackout, engine->tpm, link->asker,
                         is_socket(LINK_FD_SOCKET) ? watchdog_io(engine->watchdog) : NULL);
    if (r >= 0)
        r = data_channel_new(&engine->channel, engine->tpm, link->blackout);
    about.channel = engine->channel;
    about.asker = link->asker;
    about.blackout = link->blackout;
    if (r >= 0)
        r = server_new(&link->server, &about, LINK_FD_CONTROL, link->wake_fd);
    if (r >= 0)
        r = begin_boot(link);
    if (r >= 0)
        r = serve_all(engine);
    tpm_let_go(engine->tpm); /* the other thread may wait for it */
    if (engine->channel)
        data_channel_free(engine->channel);
    server_free(link->server);
    blackout_free(link->blackout);
    return r;
}

/* sandbox: unlinkat(arg0 == LINK_FD_CONTROL_DIRECTORY, arg2 == 0)
 *          unlinkat(arg0 == LINK_FD_DATA_DIRECTORY, arg2 == 0)
 *          unlinkat(arg0 == LINK_FD_PID_DIRECTORY, arg2 == 0)
 *          unlinkat(arg0 == LINK_FD_DIRECTORY, arg2 == 0) */
static void remove_file(int directory_fd, const char *name)
{
    if (*name && unlinkat(directory_fd, name, 0) < 0 && errno != ENOENT)
        error_report("cannot remove %s: %s", name, strerror(errno));
}

/* What a vtpmd that is attached goes by, last of all. */
static enum exit_status tell_end(struct link *link, enum exit_status status)
{
    asker_tell(link->asker, LINK_TELL_END, status, NULL, 0);
    asker_free(link->asker);
    return status;
}

/* Returns 0 or a negative errno. */
static int open_store(struct store **store)
{
    struct stat status;

    if (fstat(LINK_FD_STORE, &status) == 0 && S_ISCHR(status.st_mode))
        return store_new_alone(store);
    return store_map(store, LINK_FD_STORE, true);
}

/* Nothing is written yet, and all calls may be made. Returns what the state's files are written
 * through, or NULL. */
static struct io *open_place(struct engine *engine)
{
    engine->io = (struct io_posix){
        .io = io_posix_functions,
        .directory_fd = LINK_FD_DIRECTORY,
        .lock_fd = LINK_FD_LOCK,
    };
    if (kind_of_place() == S_IFDIR)
        return &engine->io.io;
    off_t file_bytes = lseek(LINK_FD_DIRECTORY, 0, SEEK_END);
    if (file_bytes < 0 || linear_init(&engine->linear, &engine->io.io, LINK_FD_DIRECTORY,
                                      (uint64_t)file_bytes, kind_of_place() == S_IFBLK) != 0)
        return NULL;
    return &engine->linear.io;
}

static enum exit_status serve(struct engine *engine)
{
    static const enum exit_status statuses[] = {
        [TPM_LEFT_WHOLE] = EXIT_STOPPED,
        [TPM_LEFT_JOURNAL] = EXIT_JOURNAL,
        [TPM_LEFT_NOTHING] = EXIT_REMOVED,
    };
    struct link *link = &engine->link;
    struct io *io = open_place(engine);

    if (!io) {
        error_report("cannot read the header of the state's file; start again");
        return EXIT_FAILED;
    }
    link->files = &engine->io;
    link->linear = io == &engine->linear.io ? &engine->linear : NULL;
    int r = open_store(&link->store);
    if (r < 0) {
        error_report("cannot map the store: %s; install vtpmd again", strerror(-r));
        return EXIT_FAILED;
    }
    r = watchdog_new(&engine->watchdog, io,
                     link->linear ? "the state's file, or device"
                                  : "the state directory, and the anchor",
                     WATCHDOG_LIMIT_MS);
    if (r < 0) {
        error_report("cannot watch the storage: %s; raise the limit on processes", strerror(-r));
        return EXIT_FAILED;
    }
    engine->tpm = link->tpm = tpm_new(watchdog_io(engine->watchdog));
    r = serve_tpm(engine);
    enum tpm_left left = tpm_free(engine->tpm);
    holder_end();
    watchdog_free(engine->watchdog);
    if (link->linear)
        linear_deinit(link->linear);
    store_free(link->store);
    remove_file(LINK_FD_DIRECTORY, link->serving.link_name);
    remove_file(LINK_FD_CONTROL_DIRECTORY, link->serving.socket_name);
    remove_file(LINK_FD_DATA_DIRECTORY, link->serving.data_name);
    remove_file(LINK_FD_PID_DIRECTORY, link->serving.pid_name);
    return r < 0 ? EXIT_FAILED : tell_end(link, statuses[left]);
}

/* The libraries are there already, and libcrypto's configuration. Returns 0 or a negative errno. */
static int enter_root(const char *uid)
{
    if (fchdir(LINK_FD_ROOT) < 0 || chroot(".") < 0)
        return -errno;
    close(LINK_FD_ROOT);
    return setuid((uid_t)strtoul(uid, NULL, 10)) < 0 ? -errno : 0;
}

/* sandbox: exit_group */
int main(int argc, char **argv)
{
    static struct engine engine = {.gate = PTHREAD_MUTEX_INITIALIZER};

    if (argc == 4 && strcmp(argv[1], "info") == 0)
        return inquiry_run((uint32_t)strtoul(argv[2], NULL, 10),
                           (uint32_t)strtoul(argv[3], NULL, 10));
    if (argc == 3 && strcmp(argv[1], "make") == 0)
        return inquiry_make((uint32_t)strtoul(argv[2], NULL, 10));
    if (!is_started_by_vtpmd()) {
        error_report("this is a part of vtpmd; run `vtpmd run DIR` instead");
        return EXIT_USAGE;
    }
    wipe_init();
    /* libcrypto reads its configuration now, and not when a guest waits for what uses it first. */
    OPENSSL_init_crypto(OPENSSL_INIT_LOAD_CONFIG, NULL);
    int r = argc == 3 && strcmp(argv[1], "chroot") == 0 ? enter_root(argv[2]) : 0;
    if (r < 0) {
        error_report("cannot enter the root directory, or be its user: %s; be root", strerror(-r));
        return EXIT_FAILED;
    }
    r = sandbox_enter();
    if (r < 0) {
        error_report("cannot give up privileges: %s; is the kernel older than 3.5?", strerror(-r));
        return EXIT_FAILED;
    }
    slice_be_short(); /* an answer takes microseconds, and who asks waits */
    r = open_waits(&engine);
    if (r < 0) {
        error_report("cannot wait for signals: %s", strerror(-r));
        return EXIT_FAILED;
    }
    return serve(&engine);
}
