/* Where the image stands on the disk (standing.h): docs/ARCHITECTURE.md's table against standing.c,
 * and every cell of it against a durable that goes through lives in which calls fail.
 *
 * Each event is seen where the table says that it can be, and nowhere else, as check() has it.
 * What is settled, and not elsewhere, is there after a loss of power, and what has failed is put
 * right by the next commit.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "anchor.h"
#include "bytes.h"
#include "checkpoint.h"
#include "digest.h"
#include "document.h"
#include "durable.h"
#include "io_memory.h"
#include "pages.h"
#include "state_directory.h"

/* durable.c asks the one below, which sees what is asked. */
#define standing_after standing_after_unseen
#include "standing.c"
#undef standing_after

enum {
    IMAGE_BYTES = 1500,
    ELSEWHERE = 4711, /* images that were not committed here */
    BROUGHT = 4712,
};

#define COUNT(array) (sizeof(array) / sizeof(*(array)))
#define ANCHOR_NAME "anchor"

static const char *const names[STANDING_EVENTS] = {
    [STANDING_LOADED] = "LOADED",
    [STANDING_LOADED_ELSEWHERE] = "LOADED_ELSEWHERE",
    [STANDING_WRITTEN] = "WRITTEN",
    [STANDING_NOT_WRITTEN] = "NOT_WRITTEN",
    [STANDING_IN_ROOM] = "IN_ROOM",
    [STANDING_OPENING] = "OPENING",
    [STANDING_OPENED] = "OPENED",
    [STANDING_CLOSING] = "CLOSING",
    [STANDING_CLOSED] = "CLOSED",
    [STANDING_SWITCHED] = "SWITCHED",
    [STANDING_NOT_SWITCHED] = "NOT_SWITCHED",
    [STANDING_DEFERRED] = "DEFERRED",
    [STANDING_SYNCED] = "SYNCED",
    [STANDING_NOT_SYNCED] = "NOT_SYNCED",
    [STANDING_COMMITTED] = "COMMITTED",
    [STANDING_NOT_COMMITTED] = "NOT_COMMITTED",
    [STANDING_UNSEEN] = "UNSEEN",
    [STANDING_ADOPTING] = "ADOPTING",
    [STANDING_REMOVED] = "REMOVED",
    [STANDING_ADOPTED] = "ADOPTED",
    [STANDING_ADOPTED_FILE] = "ADOPTED_FILE",
    [STANDING_NOT_ADOPTED] = "NOT_ADOPTED",
    [STANDING_RECLAIMED] = "RECLAIMED",
};

static bool seen_places[STANDING_EVENTS][STANDING_PLACES];
static bool seen_lasts[STANDING_EVENTS][STANDING_LASTS];
static struct standing standing; /* after the last event */
static bool has_begun;           /* to adopt */

struct standing standing_after(enum standing_event event, struct standing now)
{
    seen_places[event][now.place] = true;
    seen_lasts[event][now.last] = true;
    has_begun |= event == STANDING_ADOPTING;
    standing = standing_after_unseen(event, now);
    return standing;
}

static struct row read_row(const char *name)
{
    struct row row;

    const char *cell =
        document_read_cell(document_find_row(ARCHITECTURE, name), row.place, STANDING_PLACES);
    document_read_cell(cell, row.last, STANDING_LASTS);
    return row;
}

static void the_tables_rows_are_the_documents(void **state)
{
    (void)state;
    for (int event = 0; event < STANDING_EVENTS; event++) {
        struct row row = read_row(names[event]);
        assert_string_equal(row.place, rows[event].place);
        assert_string_equal(row.last, rows[event].last);
    }
}

/* The one writer of durable.c's has no other way. */
static void what_cannot_be_ends_the_engine(void **state)
{
    (void)state;
    pid_t pid = fork();
    if (pid == 0) {
        freopen("/dev/null", "w", stderr);
        signal(SIGABRT, SIG_DFL);
        standing_after(STANDING_OPENED, (struct standing){PLACE_FILE, LAST_SETTLED});
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}

/* A state directory, and the engine's part that writes to it. */
struct world {
    struct io_memory io;
    struct store *store, *writable;
    struct durable *durable;
    uint32_t last;                     /* the last image that was made */
    struct checkpoint_lineage lineage; /* of what was brought */
    bool has_failed;                   /* the last commit, and nothing has made up for it */
};

static const struct journal_settings settings = {
    .identity = "this vTPM's own.",
    .file_bytes = 2 * JOURNAL_PAGE_BYTES,
};

static void make_image(uint32_t number, uint8_t bytes[IMAGE_BYTES])
{
    for (size_t i = 0; i < IMAGE_BYTES; i++)
        bytes[i] = (uint8_t)(i * i + i / 256);
    put_be32(bytes, number);
}

/* What the test does itself is no call that may fail. */
static int begin_faultless(struct world *world)
{
    int calls = world->io.calls;

    world->io.calls = -1000;
    return calls;
}

static void end_faultless(struct world *world, int calls)
{
    assert_true(world->io.calls < 0);
    world->io.calls = calls;
}

/* An anchor that has seen nothing. */
static void set_anchor(struct world *world)
{
    static const uint8_t zeros[ANCHOR_BYTES];
    struct anchor anchor = {.identity = "this vTPM's own."};
    struct io *io = &world->io.io;
    int calls = begin_faultless(world);

    anchor.fd = io->create(io, ANCHOR_NAME);
    assert_true(anchor.fd >= 0);
    assert_int_equal(io->write_at(io, anchor.fd, zeros, sizeof(zeros), 0), 0);
    assert_int_equal(io->sync(io, anchor.fd), 0);
    assert_int_equal(io->sync_directory(io), 0);
    end_faultless(world, calls);
    if (durable_set_anchor(world->durable, &anchor) < 0)
        io->close(io, anchor.fd);
}

static void world_init(struct world *world)
{
    uint8_t image[IMAGE_BYTES];

    *world = (struct world){0};
    io_memory_init(&world->io);
    make_image(0, image);
    assert_int_equal(checkpoint_write(&world->io.io, NULL, "permall", image, IMAGE_BYTES, NULL), 0);
    assert_int_equal(store_new(&world->store), 0);
    assert_int_equal(store_map(&world->writable, store_fd(world->store), true), 0);
    assert_int_equal(durable_new(&world->durable, &world->io.io), 0);
    assert_int_equal(durable_set_journal(world->durable, &settings, world->writable, false), 0);
    assert_int_equal(durable_load(world->durable, image, IMAGE_BYTES, true), 0);
    world->io.calls = world->io.syncs = 0;
}

static void world_deinit(struct world *world)
{
    durable_free(world->durable);
    store_free(world->writable);
    store_free(world->store);
    io_memory_deinit(&world->io);
}

static int commit(struct world *world, uint32_t number)
{
    uint8_t image[IMAGE_BYTES];

    make_image(number, image);
    return durable_commit(world->durable, image, IMAGE_BYTES);
}

static int commit_same(struct world *world)
{
    uint8_t image[IMAGE_BYTES];
    const uint8_t *bytes;
    size_t n_bytes;

    assert_true(durable_get(world->durable, &bytes, &n_bytes));
    memcpy(image, bytes, IMAGE_BYTES);
    return durable_commit(world->durable, image, IMAGE_BYTES);
}

static int commit_deferred(struct world *world)
{
    durable_defer(world->durable, true);
    int r = commit(world, ++world->last);
    durable_defer(world->durable, false);
    return r;
}

static int adopt(struct world *world, bool is_to_be_written)
{
    uint8_t image[IMAGE_BYTES], digest[DIGEST_BYTES];

    make_image(ELSEWHERE, image);
    assert_int_equal(digest_compute(image, IMAGE_BYTES, digest), 0);
    bool is_half = durable_is_adopting(world->durable);
    has_begun = false;
    int r = durable_adopt(world->durable, image, IMAGE_BYTES, digest, is_to_be_written,
                          settings.identity);
    assert_int_equal(durable_is_adopting(world->durable), r < 0 && (is_half || has_begun));
    return r;
}

static int load(struct world *world, bool is_in_file)
{
    uint8_t image[IMAGE_BYTES];

    make_image(++world->last, image);
    if (is_in_file && !durable_has_journal(world->durable)) {
        int calls = begin_faultless(world);
        assert_int_equal(checkpoint_write(&world->io.io, NULL, "permall", image, IMAGE_BYTES, NULL),
                         0);
        end_faultless(world, calls);
    }
    return durable_load(world->durable, image, IMAGE_BYTES, is_in_file);
}

static int store(struct world *world)
{
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

    pthread_mutex_lock(&lock);
    int r = durable_store(world->durable, &lock);
    pthread_mutex_unlock(&lock);
    return r;
}

/* What QEMU brings is later than all there is, for which there may be room. */
static void bring(struct world *world)
{
    uint8_t image[IMAGE_BYTES];

    world->lineage = durable_lineage(world->durable);
    world->lineage.generation += 100;
    store_raise_generation(world->writable, JOURNAL_IMAGE_TYPE, world->lineage.generation);
    make_image(BROUGHT, image);
    durable_bring(world->durable, image, IMAGE_BYTES);
    durable_prepare(world->durable, image, IMAGE_BYTES, &world->lineage);
    durable_work_ahead(world->durable);
}

static int commit_brought(struct world *world)
{
    int r = durable_expect(world->durable, &world->lineage);

    if (r >= 0)
        r = commit(world, BROUGHT);
    durable_has_come(world->durable);
    return r;
}

/* One step of a life: (b)egin, (p)ause, (c)ommit, the (s)ame, (d)eferred, (e)nd; the parts of
 * folding: (f), (w)rite, swi(t)ch; (a)dopt, and write (A) what is; (l)oad what is in the file, or
 * (x) is not; (S)tore; (r)eclaim; have (R)oom; something is (B)rought, and (C)ommitted; set the
 * a(n)chor. */
static int take_step(struct world *world, char step)
{
    struct durable *durable = world->durable;

    switch (step) {
    case 'b':
        durable_begin(durable);
        return 0;
    case 'p':
        durable_pause(durable);
        return 0;
    case 'c':
        return commit(world, ++world->last);
    case 's':
        return commit_same(world);
    case 'd':
        return commit_deferred(world);
    case 'e':
        return durable_end(durable);
    case 'f':
        return durable_begin_fold(durable);
    case 'w':
        return durable_write_fold(durable);
    case 't':
        return durable_switch_fold(durable);
    case 'a':
    case 'A':
        return adopt(world, step == 'A');
    case 'l':
    case 'x':
        return load(world, step == 'l');
    case 'S':
        return store(world);
    case 'r':
        return durable_has_journal(durable) ? 0 : durable_reclaim(durable);
    case 'R':
        durable_await(durable);
        durable_work_ahead(durable);
        return 0;
    case 'B':
        bring(world);
        return 0;
    case 'C':
        return commit_brought(world);
    default:
        assert_int_equal(step, 'n');
        set_anchor(world);
        return 0;
    }
}

/* A start recovers the image. */
static bool is_recovered(const struct io_memory *after, const void *context)
{
    const struct world *world = context;
    static uint8_t image[IMAGE_BYTES_MAX];
    struct journal_evidence evidence;
    struct journal_recovery recovery;
    const uint8_t *bytes;
    size_t n_bytes;

    if (!state_directory_read(after, &settings, &evidence))
        return false;
    state_directory_recover(&evidence, image, &recovery);
    durable_get(world->durable, &bytes, &n_bytes);
    return journal_may_start(&recovery) && recovery.has_image && recovery.image_bytes == n_bytes &&
           memcmp(image, bytes, n_bytes) == 0;
}

/* Calls that fail. */
struct faults {
    int first, n_first, second; /* from call `first` on so many, and then the second; 0: none */
    enum how { BEFORE, HALF, LATE, VARIANTS } how;
};

static void set_faults(struct world *world, const struct faults *faults)
{
    bool is_over = world->io.calls >= faults->first + faults->n_first;

    world->io.fail_half = faults->how == HALF;
    world->io.fail_late = faults->how == LATE;
    world->io.fail_error = EIO;
    world->io.fail_from = is_over ? faults->second : faults->first;
    world->io.fail_to = is_over ? faults->second + 1 : faults->first + faults->n_first;
}

/* What is in its file, or settled and here, is there after any loss of power. */
static void check_settled(const struct world *world, const char *life, const char *step,
                          const struct faults *faults)
{
    bool is_here = standing.place >= PLACE_FILE && standing.place <= PLACE_BROKEN;

    if (is_here && (standing.last == LAST_SETTLED || standing.place == PLACE_FILE) &&
        !io_memory_survives(&world->io, is_recovered, world))
        fail_msg("%s, %d calls from %d on (%d): after %d steps", life, faults->n_first,
                 faults->first, faults->how, (int)(step - life) + 1);
}

/* The commit of the same image puts right what has failed. */
static void check_put_right(struct world *world, const char *life, const struct faults *faults)
{
    world->io.fail_from = 0;
    if (commit_same(world) != 0 || !io_memory_survives(&world->io, is_recovered, world))
        fail_msg("%s, %d calls from %d on (%d): at the end", life, faults->n_first, faults->first,
                 faults->how);
}

/* Of commits, and of what is in their place. */
static void note_result(struct world *world, char step, int r)
{
    bool is_commit = strchr("csdC", step);

    if (r == 0 && (is_commit || strchr("aAel", step)))
        world->has_failed = false;
    if (r < 0 && is_commit)
        world->has_failed = true;
}

/* Returns how many calls it made. */
static int live(const char *life, const struct faults *faults)
{
    struct world world;

    world_init(&world);
    for (const char *step = life; *step; step++) {
        set_faults(&world, faults);
        note_result(&world, *step, take_step(&world, *step));
        if (!faults->second)
            check_settled(&world, life, step, faults);
    }
    int n_calls = world.io.calls;
    if (world.has_failed && !faults->second)
        check_put_right(&world, life, faults);
    world_deinit(&world);
    return n_calls;
}

static void live_with_faults(const char *life, int n_first_max, bool has_second)
{
    for (enum how how = BEFORE; how < VARIANTS; how++)
        for (int n_first = 1; n_first <= n_first_max; n_first++) {
            struct faults faults = {.first = 1, .n_first = n_first, .how = how};
            for (int n_calls = 1; faults.first <= n_calls; faults.first++) {
                assert_true(n_calls < 500);
                faults.second = 0;
                n_calls = live(life, &faults);
                for (int second = faults.first + n_first + 1; has_second && second <= n_calls;
                     second++) {
                    faults.second = second;
                    live(life, &faults);
                }
            }
        }
}

/* In these each call fails, and some after it. */
static const char *const lives[] = {
    "cbcce",     "cbdde",   "bcdfwtce", "bcfwdtcse", "bcAcse",   "bcaacse",
    "bcAacSe",   "aSABCe",  "cAlscAxS", "cArSbce",   "rScxSlce", "cbcpcBCe",
    "RBCSRBCe",  "cRABCe",  "xRBCAaSs", "RBCaSe",    "xrce",     "nbccfwcte",
    "nbcacAcse", "nAcsBCe", "RBnCSce",  "ncpcasbce",
};
/* In these, too, and so does each that is called after it. */
static const char *const lives_with_two[] = {"nbcfwctAse", "bcfwdtdc", "bcfwdtAe", "bcdfwtcs"};

static bool report_unseen(const char *what, const char *cells, const bool *seen, int event)
{
    bool is_right = true;

    for (int i = 0; cells[i]; i++)
        if ((cells[i] != '-') != seen[i]) {
            print_error("%s was %sseen in %s %d\n", names[event], seen[i] ? "" : "not ", what, i);
            is_right = false;
        }
    return is_right;
}

/* There is nothing that a journal could continue. */
static void what_is_reclaimed_without_an_image_has_no_journal(void **state)
{
    struct world world;

    (void)state;
    world_init(&world);
    durable_free(world.durable);
    assert_int_equal(durable_new(&world.durable, &world.io.io), 0);
    assert_int_equal(durable_set_journal(world.durable, &settings, world.writable, false), 0);
    assert_int_equal(durable_reclaim(world.durable), 0);
    durable_begin(world.durable);
    assert_int_equal(commit(&world, 1), 0);
    assert_false(durable_has_journal(world.durable));
    assert_true(io_memory_survives(&world.io, is_recovered, &world));
    world_deinit(&world);
}

static void every_cell_is_seen_of_a_durable(void **state)
{
    bool is_right = true;

    (void)state;
    memset(seen_places, 0, sizeof(seen_places));
    memset(seen_lasts, 0, sizeof(seen_lasts));
    for (size_t i = 0; i < COUNT(lives); i++)
        live_with_faults(lives[i], 3, false);
    for (size_t i = 0; i < COUNT(lives_with_two); i++)
        live_with_faults(lives_with_two[i], 1, true);
    for (int event = 0; event < STANDING_EVENTS; event++) {
        is_right &= report_unseen("place", rows[event].place, seen_places[event], event);
        is_right &= report_unseen("last", rows[event].last, seen_lasts[event], event);
    }
    assert_true(is_right);
}

/* Whether a journal may be opened, by what happens: O off, as the TPM is; N on; C cramped, as
 * there was no room for one. It is told by what changes do then. */

static char find_journals(struct world *world)
{
    assert_int_equal(commit(world, ++world->last), 0);
    if (durable_has_journal(world->durable))
        return 'N';
    durable_begin(world->durable);
    assert_int_equal(commit(world, ++world->last), 0);
    return durable_has_journal(world->durable) ? 'O' : 'C';
}

static void begin(struct world *world)
{
    durable_begin(world->durable);
}

static void pause_it(struct world *world)
{
    durable_pause(world->durable);
}

static void cramp(struct world *world)
{
    world->io.no_room_for = JOURNAL_TEMPORARY_NAME;
    do /* a journal that is there is full at some time, and cannot be folded */
        assert_int_equal(commit(world, ++world->last), 0);
    while (durable_has_journal(world->durable));
    world->io.no_room_for = NULL;
}

/* The journal stays, and with it what there is no room for when it is full. */
static void pause_with_journal(struct world *world)
{
    begin(world);
    assert_int_equal(commit(world, ++world->last), 0);
    assert_true(durable_has_journal(world->durable));
    pause_it(world);
}

static void nothing(struct world *world)
{
    (void)world;
}

static void begin_cramped(struct world *world)
{
    begin(world);
    cramp(world);
}

static void journals_are_opened_as_the_table_says(void **state)
{
    static const struct {
        void (*enter)(struct world *world), (*happen)(struct world *world);
        char then;
    } cells[] = {
        {nothing, nothing, 'O'},          {nothing, begin, 'N'}, {nothing, pause_it, 'O'},
        {pause_with_journal, cramp, 'O'}, {begin, nothing, 'N'}, {begin, begin, 'N'},
        {begin, pause_it, 'O'},           {begin, cramp, 'C'},   {begin_cramped, begin, 'C'},
        {begin_cramped, pause_it, 'O'},
    };

    (void)state;
    for (size_t i = 0; i < COUNT(cells); i++) {
        struct world world;
        world_init(&world);
        cells[i].enter(&world);
        cells[i].happen(&world);
        assert_int_equal(find_journals(&world), cells[i].then);
        world_deinit(&world);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_tables_rows_are_the_documents),
        cmocka_unit_test(what_cannot_be_ends_the_engine),
        cmocka_unit_test(every_cell_is_seen_of_a_durable),
        cmocka_unit_test(journals_are_opened_as_the_table_says),
        cmocka_unit_test(what_is_reclaimed_without_an_image_has_no_journal),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
