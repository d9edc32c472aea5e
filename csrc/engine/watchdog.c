#include "watchdog.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "check.h"
#include "clock.h"
#include "error.h"
#include "thread.h"

enum {
    THREAD_STACK_BYTES = 64 << 10,
};

struct watchdog {
    struct io io; /* first: its functions get this */
    struct io *watched;
    const char *place;
    int limit_ms;
    pthread_t thread;
    pthread_mutex_t lock; /* over what follows */
    pthread_cond_t changed;
    int n_asked;      /* how many threads wait for an answer now */
    int64_t since_ms; /* the last answer, or the first question after it */
    bool is_told;     /* a person knows */
    bool is_asleep;   /* the thread is, until something is asked */
    bool is_ending;
};

/* sandbox: futex */
static struct io *ask(struct io *io)
{
    struct watchdog *watchdog = (struct watchdog *)io;

    pthread_mutex_lock(&watchdog->lock);
    if (watchdog->n_asked++ == 0)
        watchdog->since_ms = clock_ms();
    if (watchdog->is_asleep)
        pthread_cond_signal(&watchdog->changed);
    watchdog->is_asleep = false;
    pthread_mutex_unlock(&watchdog->lock);
    return watchdog->watched;
}

static int answer(struct io *io, int r)
{
    struct watchdog *watchdog = (struct watchdog *)io;

    pthread_mutex_lock(&watchdog->lock);
    int64_t now = clock_ms(), took_ms = now - watchdog->since_ms;
    bool is_over = watchdog->is_told;
    watchdog->n_asked--;
    watchdog->since_ms = now;
    watchdog->is_told = false;
    if (is_over)
        pthread_cond_signal(&watchdog->changed); /* another thread may still wait */
    pthread_mutex_unlock(&watchdog->lock);
    if (is_over)
        error_report("the storage answers again, after %lld s", (long long)took_ms / MS_PER_S);
    return r;
}

/* Without the lock, as who reads standard error may not. */
static void tell(struct watchdog *watchdog)
{
    watchdog->is_told = true;
    pthread_mutex_unlock(&watchdog->lock);
    error_report("the storage has not answered for %d s: the guest's TPM waits for it, for as long "
                 "as that takes; look at what holds %s",
                 watchdog->limit_ms / MS_PER_S, watchdog->place);
    pthread_mutex_lock(&watchdog->lock);
}

static void *watch(void *argument)
{
    struct watchdog *watchdog = argument;

    pthread_mutex_lock(&watchdog->lock);
    while (!watchdog->is_ending) {
        int64_t limit_ms = watchdog->since_ms + watchdog->limit_ms;
        if (watchdog->n_asked == 0 || watchdog->is_told) {
            watchdog->is_asleep = !watchdog->is_told;
            pthread_cond_wait(&watchdog->changed, &watchdog->lock);
        } else if (clock_ms() < limit_ms) {
            clock_wait_until(&watchdog->changed, &watchdog->lock, limit_ms);
        } else {
            tell(watchdog);
        }
    }
    pthread_mutex_unlock(&watchdog->lock);
    return NULL;
}

static int watched_create(struct io *io, const char *name)
{
    struct io *watched = ask(io);

    return answer(io, watched->create(watched, name));
}

static int watched_write(struct io *io, int fd, struct iovec *vectors, int n_vectors)
{
    struct io *watched = ask(io);

    return answer(io, watched->write(watched, fd, vectors, n_vectors));
}

static int watched_write_at(struct io *io, int fd, const uint8_t *bytes, size_t n_bytes,
                            off_t offset)
{
    struct io *watched = ask(io);

    return answer(io, watched->write_at(watched, fd, bytes, n_bytes, offset));
}

static int watched_read_at(struct io *io, int fd, uint8_t *bytes, size_t n_bytes, off_t offset)
{
    struct io *watched = ask(io);

    return answer(io, watched->read_at(watched, fd, bytes, n_bytes, offset));
}

static void watched_set_direct(struct io *io, int fd)
{
    struct io *watched = ask(io);

    watched->set_direct(watched, fd);
    answer(io, 0);
}

static int watched_sync(struct io *io, int fd)
{
    struct io *watched = ask(io);

    return answer(io, watched->sync(watched, fd));
}

static int watched_sync_data(struct io *io, int fd)
{
    struct io *watched = ask(io);

    return answer(io, watched->sync_data(watched, fd));
}

static void watched_close(struct io *io, int fd)
{
    struct io *watched = ask(io);

    watched->close(watched, fd);
    answer(io, 0);
}

static int watched_rename(struct io *io, const char *from, const char *to)
{
    struct io *watched = ask(io);

    return answer(io, watched->rename(watched, from, to));
}

static int watched_unlink(struct io *io, const char *name)
{
    struct io *watched = ask(io);

    return answer(io, watched->unlink(watched, name));
}

static int watched_find(struct io *io, const char *name)
{
    struct io *watched = ask(io);

    return answer(io, watched->find(watched, name));
}

static int watched_sync_directory(struct io *io)
{
    struct io *watched = ask(io);

    return answer(io, watched->sync_directory(watched));
}

static void watched_look_again(struct io *io)
{
    struct io *watched = ((struct watchdog *)io)->watched;

    watched->look_again(watched); /* which does not wait for the disk */
}

static int watched_lock(struct io *io, bool is_so)
{
    struct io *watched = ask(io);

    return answer(io, watched->lock(watched, is_so));
}

static const struct io watched_functions = {
    .create = watched_create,
    .write = watched_write,
    .write_at = watched_write_at,
    .read_at = watched_read_at,
    .set_direct = watched_set_direct,
    .sync = watched_sync,
    .sync_data = watched_sync_data,
    .close = watched_close,
    .rename = watched_rename,
    .unlink = watched_unlink,
    .find = watched_find,
    .sync_directory = watched_sync_directory,
    .look_again = watched_look_again,
    .lock = watched_lock,
};

int watchdog_new(struct watchdog **out, struct io *io, const char *place, int limit_ms)
{
    struct watchdog *watchdog = calloc(1, sizeof(*watchdog));

    if (!watchdog)
        return -ENOMEM;
    watchdog->io = watched_functions;
    watchdog->watched = io;
    watchdog->place = place;
    watchdog->limit_ms = limit_ms;
    check(pthread_mutex_init(&watchdog->lock, NULL) == 0);
    clock_condition_init(&watchdog->changed);
    int r = thread_start(&watchdog->thread, THREAD_STACK_BYTES, watch, watchdog);
    if (r < 0) {
        free(watchdog);
        return r;
    }
    *out = watchdog;
    return 0;
}

void watchdog_free(struct watchdog *watchdog)
{
    pthread_mutex_lock(&watchdog->lock);
    watchdog->is_ending = true;
    pthread_cond_signal(&watchdog->changed);
    pthread_mutex_unlock(&watchdog->lock);
    pthread_join(watchdog->thread, NULL);
    pthread_cond_destroy(&watchdog->changed);
    pthread_mutex_destroy(&watchdog->lock);
    free(watchdog);
}

struct io *watchdog_io(struct watchdog *watchdog)
{
    return &watchdog->io;
}
