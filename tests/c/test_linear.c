/* Invariant 2 in a linear file: after a loss of power at any step each state is the last durable
 * one or the next, whole; once a write was acknowledged, it is that one. Whatever fails in between.
 *
 * And what others rely on: a device is as long as it was, sections are as swtpm can move them, and
 * no header makes us read or write where no state is. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bytes.h"
#include "checkpoint.h"
#include "io_memory.h"
#include "linear.h"

enum {
    DEVICE_BYTES = 96 << 10,
    STATE_BYTES_MAX = 9000,
    VALUES_MAX = 64,
    FILE_NAME_BYTES = 16,
};

static const char file_name[] = "device";
static const char *const names[LINEAR_STATES] = {"permall", "volatilestate", "savestate"};

/* A linear file in memory, and what serves it. */
struct world {
    struct io_memory memory;
    struct linear linear;
    int fd;
    bool is_fixed;
};

static void start(struct world *world)
{
    const uint8_t *bytes;
    size_t n_bytes;

    assert_true(io_memory_read(&world->memory, file_name, &bytes, &n_bytes));
    assert_int_equal(
        linear_init(&world->linear, &world->memory.io, world->fd, n_bytes, world->is_fixed), 0);
}

/* Begin with these bytes, which are on the disk. */
static void world_init(struct world *world, const uint8_t *bytes, size_t n_bytes, bool is_fixed)
{
    struct io *io = &world->memory.io;

    io_memory_init(&world->memory);
    world->is_fixed = is_fixed;
    world->fd = io->create(io, file_name);
    assert_int_equal(io->write_at(io, world->fd, bytes, n_bytes, 0), 0);
    assert_int_equal(io->sync(io, world->fd), 0);
    assert_int_equal(io->sync_directory(io), 0);
    world->memory.calls = world->memory.syncs = 0;
    start(world);
}

static void world_deinit(struct world *world)
{
    linear_deinit(&world->linear);
    io_memory_deinit(&world->memory);
}

/* A state is made of its number, so that a mixture of two is none. */
static void make_state(uint32_t number, uint8_t *bytes, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i++)
        bytes[i] = (uint8_t)((number + 1) * 2654435761U >> i % 4 * 8) ^ (uint8_t)(i / 4);
}

static size_t size_of(uint32_t number)
{
    return 1 + number * UINT64_C(2654435761) % STATE_BYTES_MAX;
}

static int write_state(struct world *world, size_t state, uint32_t number)
{
    uint8_t bytes[STATE_BYTES_MAX];

    make_state(number, bytes, size_of(number));
    return checkpoint_write(&world->linear.io, NULL, names[state], bytes, size_of(number), NULL);
}

static uint32_t get_le32(const uint8_t *bytes)
{
    return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

/* Return true if a file holds the state of this number; read apart from the code under test. */
static bool holds(const uint8_t *file, size_t file_bytes, size_t state, uint32_t number)
{
    const uint8_t *slot = file + 12 + 12 * state;
    uint32_t offset = get_le32(slot), n_bytes = get_le32(slot + 4);
    uint8_t bytes[STATE_BYTES_MAX];

    if (file_bytes < 192 || offset == 0 || offset + n_bytes > file_bytes ||
        n_bytes != CHECKPOINT_HEADER_BYTES + size_of(number))
        return false;
    make_state(number, bytes, size_of(number));
    return memcmp(file + offset + CHECKPOINT_HEADER_BYTES, bytes, size_of(number)) == 0;
}

static bool is_absent(const uint8_t *file, size_t file_bytes, size_t state)
{
    return file_bytes < 192 || get_le32(file + 12 + 12 * state) == 0;
}

/* swtpm can move its sections: they are in the file, and each begins where the one before ends. */
static bool is_swtpms(const uint8_t *file, size_t file_bytes)
{
    uint64_t first = UINT64_MAX, end = 0, total = 0;

    for (size_t i = 0; i < LINEAR_STATES && file_bytes >= 192; i++) {
        const uint8_t *slot = file + 12 + 12 * i;
        uint64_t begins = get_le32(slot), n_bytes = get_le32(slot + 8);
        if (begins == 0)
            continue;
        total += n_bytes;
        first = begins < first ? begins : first;
        end = begins + n_bytes > end ? begins + n_bytes : end;
    }
    return total == 0 || (end - first == total && end <= file_bytes);
}

static void assert_holds(const struct world *world, size_t state, uint32_t number)
{
    const uint8_t *bytes;
    size_t n_bytes;

    assert_true(io_memory_read(&world->memory, file_name, &bytes, &n_bytes));
    assert_true(holds(bytes, n_bytes, state, number));
    assert_true(is_swtpms(bytes, n_bytes));
}

/* What each state may be: one of these, or absent. */
struct allowed {
    struct {
        bool absent;
        uint32_t values[VALUES_MAX];
        size_t n_values;
    } states[LINEAR_STATES];
};

static bool is_allowed(const struct io_memory *after, const void *context)
{
    const struct allowed *allowed = context;
    struct linear_header header;
    const uint8_t *bytes;
    size_t n_bytes;

    if (!io_memory_read(after, file_name, &bytes, &n_bytes))
        return false;
    if (n_bytes >= 192 && get_le32(bytes) != 0 &&
        linear_decode(bytes, 192, n_bytes, &header) != LINEAR_NOTHING)
        return false;
    for (size_t i = 0; i < LINEAR_STATES; i++) {
        bool is_so = allowed->states[i].absent && is_absent(bytes, n_bytes, i);
        for (size_t k = 0; k < allowed->states[i].n_values; k++)
            is_so |= holds(bytes, n_bytes, i, allowed->states[i].values[k]);
        if (!is_so)
            return false;
    }
    return is_swtpms(bytes, n_bytes);
}

static void allow_only(struct allowed *allowed, size_t state, uint32_t number)
{
    allowed->states[state].absent = false;
    allowed->states[state].n_values = 1;
    allowed->states[state].values[0] = number;
}

static void allow_only_absent(struct allowed *allowed, size_t state)
{
    allowed->states[state].absent = true;
    allowed->states[state].n_values = 0;
}

static void allow_too(struct allowed *allowed, size_t state, uint32_t number)
{
    assert_true(allowed->states[state].n_values < VALUES_MAX);
    allowed->states[state].values[allowed->states[state].n_values++] = number;
}

static struct allowed nothing_there(void)
{
    struct allowed allowed;

    for (size_t i = 0; i < LINEAR_STATES; i++)
        allow_only_absent(&allowed, i);
    return allowed;
}

/* Numbers of states that take a unit, as all combinations of more sectors would be too many. */
static uint32_t small(uint32_t nth)
{
    uint32_t number = 0;

    for (;; number++)
        if (size_of(number) < 1500 && nth-- == 0)
            return number;
}

/* Replace a state, as the power is lost at each call. Returns false if one was lost. */
static bool survives_every_power_loss(int skip_sync)
{
    static uint8_t empty[DEVICE_BYTES];
    bool survived = true;

    for (int step = 1;; step++) {
        struct allowed allowed = nothing_there();
        struct world world;
        world_init(&world, empty, sizeof(empty), true);
        assert_int_equal(write_state(&world, 0, small(0)), 0);
        assert_int_equal(write_state(&world, 1, small(1)), 0);
        allow_only(&allowed, 0, small(0));
        allow_only(&allowed, 1, small(1));
        world.memory.calls = world.memory.syncs = 0;
        world.memory.skip_sync = skip_sync;
        world.memory.off_from = step;
        bool acknowledged = write_state(&world, 0, small(2)) == 0;
        if (acknowledged)
            allow_only(&allowed, 0, small(2));
        else
            allow_too(&allowed, 0, small(2));
        survived &= io_memory_survives(&world.memory, is_allowed, &allowed);
        world_deinit(&world);
        if (acknowledged)
            return survived;
        assert_true(step < 20);
    }
}

static void invariant_2_every_power_loss_leaves_a_whole_state(void **state)
{
    (void)state;
    assert_true(survives_every_power_loss(0));
}

static void canary_either_sync_is_missed(void **state)
{
    (void)state;
    assert_false(survives_every_power_loss(1));
    assert_false(survives_every_power_loss(2));
    assert_true(survives_every_power_loss(3)); /* there is no third */
}

/* The first state in an empty file: it is that, or nothing, and never something else. */
static bool first_state_survives(size_t file_bytes, bool is_fixed)
{
    static uint8_t empty[DEVICE_BYTES];
    bool survived = true;

    for (int step = 1;; step++) {
        struct allowed allowed = nothing_there();
        struct world world;
        world_init(&world, empty, file_bytes, is_fixed);
        world.memory.off_from = step;
        bool acknowledged = write_state(&world, 0, small(0)) == 0;
        if (acknowledged)
            allow_only(&allowed, 0, small(0));
        else
            allow_too(&allowed, 0, small(0));
        survived &= io_memory_survives(&world.memory, is_allowed, &allowed);
        world_deinit(&world);
        if (acknowledged)
            return survived;
    }
}

static bool is_formatted_or_empty(const struct io_memory *after, const void *context)
{
    struct linear_header header;
    const uint8_t *bytes;
    size_t n_bytes;

    (void)context;
    assert_true(io_memory_read(after, file_name, &bytes, &n_bytes));
    for (size_t i = 0; i < n_bytes; i++)
        if (bytes[i])
            return linear_decode(bytes, n_bytes, n_bytes, &header) == LINEAR_NOTHING;
    return true;
}

static void first_state_leaves_an_empty_file_or_a_header(void **state)
{
    static uint8_t empty[DEVICE_BYTES];

    (void)state;
    assert_true(first_state_survives(DEVICE_BYTES, true));
    assert_true(first_state_survives(0, false));
    for (int step = 1; step < 10; step++) {
        struct world world;
        world_init(&world, empty, step % 2 ? DEVICE_BYTES : 0, step % 2);
        world.memory.off_from = step;
        write_state(&world, 0, small(0));
        assert_true(io_memory_survives(&world.memory, is_formatted_or_empty, NULL));
        world_deinit(&world);
    }
}

/* A process was killed before it synced its header, and the next one takes room. */
static bool header_of_a_killed_process_survives(int skip_sync)
{
    static uint8_t empty[DEVICE_BYTES];
    struct allowed allowed = nothing_there();
    struct world world;

    world_init(&world, empty, sizeof(empty), true);
    assert_int_equal(write_state(&world, 0, small(0)), 0);
    world.memory.calls = world.memory.syncs = 0;
    world.memory.skip_sync = 2; /* the header's */
    assert_int_equal(write_state(&world, 0, small(1)), 0);
    linear_deinit(&world.linear);
    start(&world);
    world.memory.syncs = 0;
    world.memory.skip_sync = skip_sync;
    world.memory.off_from = world.memory.calls + 3; /* it has got to write its data */
    allow_too(&allowed, 0, small(0));
    allow_too(&allowed, 0, small(1));
    allow_too(&allowed, 0, small(2));
    allowed.states[0].absent = false;
    assert_true(write_state(&world, 0, small(2)) < 0);
    bool survived = io_memory_survives(&world.memory, is_allowed, &allowed);
    world_deinit(&world);
    return survived;
}

static void a_header_that_nobody_synced_is_synced_before_room_is_taken(void **state)
{
    (void)state;
    assert_true(header_of_a_killed_process_survives(0));
    assert_false(header_of_a_killed_process_survives(1));
}

static int n_header_writes;
static int (*write_at_below)(struct io *io, int fd, const uint8_t *bytes, size_t n_bytes,
                             off_t offset);

static int count_header_writes(struct io *io, int fd, const uint8_t *bytes, size_t n_bytes,
                               off_t offset)
{
    n_header_writes += offset == 0;
    return write_at_below(io, fd, bytes, n_bytes, offset);
}

/* Linux says once that a page could not be written, and takes it for written from then on. */
static void a_header_that_could_not_be_synced_is_written_again(void **state)
{
    static uint8_t empty[DEVICE_BYTES];
    struct world world;

    (void)state;
    world_init(&world, empty, sizeof(empty), true);
    assert_int_equal(write_state(&world, 0, 1), 0);
    write_at_below = world.memory.io.write_at;
    world.memory.io.write_at = count_header_writes;
    world.memory.fail_from = world.memory.calls + 4; /* the header's sync */
    world.memory.fail_to = world.memory.fail_from + 1;
    assert_int_equal(write_state(&world, 0, 2), -EIO);
    assert_int_equal(n_header_writes, 1);
    assert_int_equal(checkpoint_remove(&world.linear.io, names[1]), 0); /* syncs, in any case */
    assert_int_equal(n_header_writes, 2);
    assert_holds(&world, 0, 2);
    world_deinit(&world);
}

/* At each call of a write, whether it has done what it says or not: the next one works. */
static void what_has_failed_once_is_done_the_next_time(void **state)
{
    static uint8_t empty[DEVICE_BYTES];

    (void)state;
    for (int step = 1; step <= 4; step++)
        for (int is_late = 0; is_late < 2; is_late++) {
            struct world world;
            world_init(&world, empty, sizeof(empty), true);
            assert_int_equal(write_state(&world, 0, 1), 0);
            world.memory.fail_late = is_late;
            world.memory.fail_from = world.memory.calls + step;
            world.memory.fail_to = world.memory.fail_from + 1;
            assert_int_equal(write_state(&world, 0, 2), -EIO);
            assert_int_equal(write_state(&world, 0, 3), 0);
            assert_holds(&world, 0, 3);
            world_deinit(&world);
        }
}

static void after_loss(struct world *world, struct io_choices *choices)
{
    struct io_memory after;

    io_memory_init(&after);
    io_memory_lose_power(&world->memory, choices, &after);
    linear_deinit(&world->linear);
    io_memory_deinit(&world->memory);
    world->memory = after;
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        if (strcmp(world->memory.entries[i].name, file_name) == 0)
            world->fd = world->memory.entries[i].file;
    start(world);
}

/* One operation on one state, and what it may leave. */
static void do_something(struct world *world, struct io_choices *random, struct allowed *allowed)
{
    size_t which = io_choose(random, LINEAR_STATES);
    uint32_t number = io_choose(random, 1 << 20);

    if (which > 0 && io_choose(random, 3) == 0) {
        if (checkpoint_remove(&world->linear.io, names[which]) == 0)
            allow_only_absent(allowed, which);
        else
            allowed->states[which].absent = true;
    } else if (write_state(world, which, number) == 0) {
        allow_only(allowed, which, number);
        assert_holds(world, which, number);
    } else {
        allow_too(allowed, which, number);
    }
}

/* A few operations, of which one fails or all after it, as the disk or the power does. A write that
 * fails has done nothing or all: half of a sector no disk writes. */
static void live(struct world *world, struct io_choices *random, struct allowed *allowed)
{
    struct io_memory *memory = &world->memory;

    memory->fail_late = io_choose(random, 2);
    memory->fail_from = memory->calls + 1 + (int)io_choose(random, 14);
    memory->fail_to = memory->fail_from + 1 + (int)io_choose(random, 2);
    memory->off_from = io_choose(random, 4) ? memory->fail_to + (int)io_choose(random, 10) : 0;
    for (uint32_t i = io_choose(random, 8); i > 0; i--)
        do_something(world, random, allowed);
}

static void states_survive_a_history(uint64_t seed, size_t file_bytes, bool is_fixed)
{
    static struct io_choices random;
    static uint8_t empty[DEVICE_BYTES];
    struct allowed allowed = nothing_there();
    struct world world;

    io_choices_init_sampled(&random, seed);
    world_init(&world, empty, file_bytes, is_fixed);
    for (int life = 0; life < 6; life++) {
        const uint8_t *bytes;
        size_t n_bytes;
        live(&world, &random, &allowed);
        after_loss(&world, &random);
        assert_true(is_allowed(&world.memory, &allowed));
        assert_true(io_memory_read(&world.memory, file_name, &bytes, &n_bytes));
        if (is_fixed)
            assert_int_equal(n_bytes, file_bytes);
    }
    world_deinit(&world);
}

static void states_survive_any_history(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 500; seed++)
        states_survive_a_history(seed, seed % 2 ? DEVICE_BYTES : 0, seed % 2);
}

/* Also one that ends in the middle of a unit. */
static void a_device_that_is_full_keeps_what_it_has(void **state)
{
    static uint8_t empty[DEVICE_BYTES];
    uint32_t large = 0;

    (void)state;
    while (size_of(large) < 8200)
        large++;
    for (size_t file_bytes = 512; file_bytes < 40000; file_bytes += 1536) {
        struct allowed allowed = nothing_there();
        struct world world;
        const uint8_t *bytes;
        size_t n_bytes;
        world_init(&world, empty, file_bytes, true);
        for (uint32_t i = 0; i < 4; i++) {
            int r = write_state(&world, i % 2, i < 2 ? small(i) : large);
            assert_true(r == 0 || r == -ENOSPC);
            if (r == 0)
                allow_only(&allowed, i % 2, i < 2 ? small(i) : large);
            assert_true(is_allowed(&world.memory, &allowed));
        }
        assert_true(io_memory_read(&world.memory, file_name, &bytes, &n_bytes));
        assert_int_equal(n_bytes, file_bytes);
        world_deinit(&world);
    }
}

/* As two hosts do that have a device, and no lock in common. */
static void see_another_writer(bool is_fixed)
{
    static uint8_t empty[DEVICE_BYTES];
    struct world world;
    struct linear other;

    world_init(&world, empty, is_fixed ? sizeof(empty) : 0, is_fixed);
    assert_int_equal(write_state(&world, 0, 1), 0);
    struct linear ours = world.linear;
    start(&world); /* the other's view */
    other = world.linear;
    world.linear = ours;
    assert_int_equal(write_state(&world, 0, 2), 0);
    ours = world.linear;
    world.linear = other;
    assert_int_equal(write_state(&world, 0, 3), -EBUSY);
    assert_int_equal(write_state(&world, 1, 3), -EBUSY);
    assert_holds(&world, 0, 2);
    other = world.linear;
    world.linear = ours;
    assert_int_equal(write_state(&world, 0, 4), 0);
    assert_holds(&world, 0, 4);
    ours = world.linear;
    world.linear = other; /* QEMU brings it the state */
    world.linear.io.look_again(&world.linear.io);
    assert_int_equal(write_state(&world, 1, 5), 0);
    assert_holds(&world, 0, 4);
    assert_holds(&world, 1, 5);
    linear_deinit(&world.linear);
    world.linear = ours;
    assert_int_equal(write_state(&world, 0, 6), -EBUSY);
    assert_holds(&world, 0, 4);
    world_deinit(&world);
}

static void another_writer_is_seen_and_nothing_overwritten(void **state)
{
    (void)state;
    see_another_writer(true);
    see_another_writer(false);
}

static void what_is_made_at_once_has_room_of_its_own(void **state)
{
    static uint8_t empty[DEVICE_BYTES];
    uint8_t bytes[STATE_BYTES_MAX];
    struct world world;

    (void)state;
    world_init(&world, empty, sizeof(empty), true);
    make_state(7, bytes, size_of(7));
    assert_int_equal(checkpoint_prepare(&world.linear.io, NULL, names[0], bytes, size_of(7), NULL),
                     0);
    assert_int_equal(write_state(&world, 1, 8), 0);
    assert_int_equal(write_state(&world, 1, 9), 0);
    assert_int_equal(checkpoint_publish(&world.linear.io, names[0]), 0);
    assert_holds(&world, 0, 7);
    assert_holds(&world, 1, 9);
    world_deinit(&world);
}

/* Put a slot as swtpm does. */
static void put_slot(uint8_t *file, size_t slot, uint32_t offset, uint32_t n_bytes,
                     uint32_t section_bytes)
{
    const uint32_t values[] = {offset, n_bytes, section_bytes};

    for (size_t i = 0; i < 3; i++)
        for (size_t k = 0; k < 4; k++)
            file[12 + 12 * slot + 4 * i + k] = (uint8_t)(values[i] >> 8 * k);
}

static void put_magic(uint8_t *file)
{
    memcpy(file, "nilmptws\1\0\xc0\0", 12);
}

static void a_file_of_swtpms_is_gone_on_from(void **state)
{
    static uint8_t file[192 + 2 * 8192];
    uint8_t before[5000];
    struct linear_header header;
    struct world world;
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    put_magic(file);
    put_slot(file, 0, 192, 5000, 8192);
    put_slot(file, 1, 192 + 8192, 6000, 8192);
    make_state(1, file + 192, 5000);
    make_state(2, file + 192 + 8192, 6000);
    memcpy(before, file + 192, sizeof(before));
    world_init(&world, file, sizeof(file), false);
    assert_int_equal(write_state(&world, 1, 3), 0);
    assert_true(io_memory_read(&world.memory, file_name, &bytes, &n_bytes));
    assert_int_equal(linear_decode(bytes, n_bytes, n_bytes, &header), LINEAR_NOTHING);
    assert_int_equal(header.states[0].offset, 192);
    assert_memory_equal(bytes + 192, before, sizeof(before));
    assert_holds(&world, 1, 3);
    world_deinit(&world);
}

static void there_is_room_for_states_alone(void **state)
{
    static uint8_t empty[DEVICE_BYTES];
    struct world world;

    (void)state;
    world_init(&world, empty, sizeof(empty), true);
    struct io *io = &world.linear.io;
    assert_int_equal(io->create(io, "TMP2-00.journal"), -EROFS);
    assert_int_equal(io->create(io, "tpm2-00.permall"), -EROFS);
    assert_int_equal(io->unlink(io, "tpm2-00.journal"), -ENOENT);
    assert_int_equal(io->find(io, "tpm2-00.permall"), -ENOENT);
    assert_int_equal(write_state(&world, 0, 1), 0);
    assert_int_equal(io->find(io, "tpm2-00.permall"), 0);
    assert_int_equal(io->write_at(io, 0, empty, 1, 0), -EROFS);
    assert_holds(&world, 0, 1);
    world_deinit(&world);
}

/* Each with one thing that is wrong, at its limit, and the same on the right side of it. */
static void hostile_headers_are_refused(void **state)
{
    static const struct {
        size_t slot;
        uint32_t offset, n_bytes, section_bytes;
        enum linear_fault fault;
    } cases[] = {
        {1, 2192, 1, 100, LINEAR_NOTHING},
        {1, 2191, 1, 100, LINEAR_FAULT_OVERLAP},
        {1, 192, 1, 1, LINEAR_FAULT_OVERLAP},
        {1, 191, 1, 1, LINEAR_FAULT_SECTION},
        {1, 1, 1, 1, LINEAR_FAULT_SECTION},
        {1, 9000, 1000, 1000, LINEAR_NOTHING},
        {1, 9000, 1000, 1001, LINEAR_FAULT_SECTION},
        {1, 9000, 1001, 1000, LINEAR_FAULT_SECTION},
        {1, 9000, 0, 1000, LINEAR_FAULT_SECTION},
        {1, 10000, 1, 1, LINEAR_FAULT_SECTION},
        {1, UINT32_MAX, 1, 2, LINEAR_FAULT_SECTION},
        {1, 9000, 1, UINT32_MAX - 8999, LINEAR_FAULT_SECTION},
        {1, 0, UINT32_MAX, UINT32_MAX, LINEAR_NOTHING},
        {3, 9000, 1, 1, LINEAR_FAULT_SLOTS},
        {14, 9000, 1, 1, LINEAR_FAULT_SLOTS},
    };
    struct linear_header header;
    uint8_t file[192];

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        memset(file, 0, sizeof(file));
        put_magic(file);
        put_slot(file, 0, 192, 2000, 2000);
        put_slot(file, cases[i].slot, cases[i].offset, cases[i].n_bytes, cases[i].section_bytes);
        assert_int_equal(linear_decode(file, sizeof(file), 10000, &header), cases[i].fault);
    }
    put_slot(file, 14, 0, 0, 0);
    assert_int_equal(linear_decode(file, 191, 10000, &header), LINEAR_FAULT_MAGIC);
    put_slot(file, 1, 5000, LINEAR_DATA_BYTES_MAX + 1, 1 << 20);
    assert_int_equal(linear_decode(file, 192, 2 << 20, &header), LINEAR_FAULT_SECTION);
    for (size_t at = 0; at < 12; at++) {
        file[at] ^= 2;
        enum linear_fault fault = linear_decode(file, 192, 10000, &header);
        if (at != 9)
            assert_int_equal(fault, at < 8 ? LINEAR_FAULT_MAGIC : LINEAR_FAULT_VERSION);
        file[at] ^= 2;
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(invariant_2_every_power_loss_leaves_a_whole_state),
        cmocka_unit_test(canary_either_sync_is_missed),
        cmocka_unit_test(first_state_leaves_an_empty_file_or_a_header),
        cmocka_unit_test(a_header_that_nobody_synced_is_synced_before_room_is_taken),
        cmocka_unit_test(a_header_that_could_not_be_synced_is_written_again),
        cmocka_unit_test(what_has_failed_once_is_done_the_next_time),
        cmocka_unit_test(states_survive_any_history),
        cmocka_unit_test(a_device_that_is_full_keeps_what_it_has),
        cmocka_unit_test(another_writer_is_seen_and_nothing_overwritten),
        cmocka_unit_test(what_is_made_at_once_has_room_of_its_own),
        cmocka_unit_test(a_file_of_swtpms_is_gone_on_from),
        cmocka_unit_test(there_is_room_for_states_alone),
        cmocka_unit_test(hostile_headers_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
