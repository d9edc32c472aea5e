#include "io_memory.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"

enum {
    NO_FILE = -1,
    BYTES_MIN = 1 << 12,
};

/* Over all of them, as a TPM's files are written by more threads than one. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void unlock(pthread_mutex_t **locked)
{
    pthread_mutex_unlock(*locked);
}

#define LOCKED()                                                                                   \
    cleanup(unlock) pthread_mutex_t *locked __attribute__((unused)) = &lock;                       \
    pthread_mutex_lock(&lock)

static bool fails(struct io *io)
{
    struct io_memory *memory = (struct io_memory *)io;

    memory->calls++;
    if (memory->off_from && memory->calls >= memory->off_from)
        return true;
    return memory->fail_from && memory->calls >= memory->fail_from &&
           (!memory->fail_to || memory->calls < memory->fail_to);
}

static int failure(struct io *io)
{
    return -((struct io_memory *)io)->fail_error;
}

/* Returns true if this sync does what it says. */
static bool syncs(struct io *io)
{
    struct io_memory *memory = (struct io_memory *)io;

    memory->syncs++;
    return memory->syncs != memory->skip_sync;
}

static struct io_memory_entry *find_entry(struct io_memory_entry *entries, const char *name)
{
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        if (entries[i].file != NO_FILE && strcmp(entries[i].name, name) == 0)
            return &entries[i];
    return NULL;
}

static void add_entry(struct io_memory_entry *entries, const char *name, int file)
{
    struct io_memory_entry *entry = find_entry(entries, name);

    for (int i = 0; !entry && i < IO_MEMORY_FILES_MAX; i++)
        if (entries[i].file == NO_FILE)
            entry = &entries[i];
    check(entry);
    snprintf(entry->name, sizeof(entry->name), "%s", name);
    entry->file = file;
}

/* A change is whole: it takes the one name away and gives the other. */
static void apply_change(struct io_memory_entry *entries, const struct io_memory_change *change)
{
    struct io_memory_entry *from = find_entry(entries, change->from);

    if (from && from->file == change->file)
        from->file = NO_FILE;
    if (change->to[0])
        add_entry(entries, change->to, change->file);
}

static void change_directory(struct io_memory *memory, const char *from, const char *to, int file)
{
    check(memory->n_changes < IO_MEMORY_PENDING_MAX);
    struct io_memory_change *change = &memory->changes[memory->n_changes++];
    snprintf(change->from, sizeof(change->from), "%s", from);
    snprintf(change->to, sizeof(change->to), "%s", to);
    change->file = file;
    apply_change(memory->entries, change);
}

static bool is_named(const struct io_memory *memory, int file)
{
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        if (memory->entries[i].file == file || memory->durable_entries[i].file == file)
            return true;
    for (size_t i = 0; i < memory->n_changes; i++)
        if (memory->changes[i].file == file)
            return true;
    return false;
}

static int find_unused_file(struct io_memory *memory)
{
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        if (!memory->files[i].used || !is_named(memory, i))
            return i;
    check(false);
    return NO_FILE;
}

static int memory_create(struct io *io, const char *name)
{
    LOCKED();
    struct io_memory *memory = (struct io_memory *)io;

    bool no_room = memory->no_room_for && strcmp(name, memory->no_room_for) == 0;

    if (fails(io) || memory->fails_to_create || no_room)
        return failure(io);
    int number = find_unused_file(memory);
    struct io_memory_file *file = &memory->files[number];
    file->used = true;
    file->is_direct = false;
    file->n_bytes = file->n_durable_bytes = file->n_writes = 0;
    change_directory(memory, "", name, number);
    return number;
}

static void reserve(struct io_memory_file *file, size_t n_bytes)
{
    if (file->bytes && n_bytes <= file->n_allocated)
        return;
    size_t n_allocated = n_bytes * 2 > BYTES_MIN ? n_bytes * 2 : BYTES_MIN;
    file->bytes = realloc(file->bytes, n_allocated);
    file->durable_bytes = realloc(file->durable_bytes, n_allocated);
    check(file->bytes && file->durable_bytes);
    file->n_allocated = n_allocated;
}

static void add_pending(struct io_memory_file *file, uint32_t sector)
{
    size_t offset = (size_t)sector * IO_MEMORY_SECTOR_BYTES;
    size_t n_bytes = file->n_bytes - offset;

    if (file->n_writes == file->n_writes_allocated) {
        file->n_writes_allocated = file->n_writes_allocated * 2 + 16;
        file->writes = realloc(file->writes, file->n_writes_allocated * sizeof(*file->writes));
        check(file->writes);
    }
    struct io_memory_write *write = &file->writes[file->n_writes++];
    memset(write, 0, sizeof(*write));
    write->sector = sector;
    memcpy(write->bytes, file->bytes + offset,
           n_bytes < IO_MEMORY_SECTOR_BYTES ? n_bytes : IO_MEMORY_SECTOR_BYTES);
}

static void put(struct io_memory_file *file, const uint8_t *bytes, size_t n_bytes, size_t offset)
{
    size_t end = offset + n_bytes;

    check(file->used);
    if (n_bytes == 0)
        return;
    reserve(file, end);
    if (offset > file->n_bytes)
        memset(file->bytes + file->n_bytes, 0, offset - file->n_bytes);
    memcpy(file->bytes + offset, bytes, n_bytes);
    file->n_bytes = end > file->n_bytes ? end : file->n_bytes;
    for (size_t sector = offset / IO_MEMORY_SECTOR_BYTES; sector * IO_MEMORY_SECTOR_BYTES < end;
         sector++)
        add_pending(file, (uint32_t)sector);
}

static int memory_write(struct io *io, int fd, struct iovec *vectors, int n_vectors)
{
    LOCKED();
    struct io_memory *memory = (struct io_memory *)io;
    struct io_memory_file *file = &memory->files[fd];
    bool failing = fails(io);

    if (failing && !memory->fail_half)
        return failure(io);
    for (int i = 0; i < (failing ? n_vectors / 2 : n_vectors); i++)
        put(file, vectors[i].iov_base, vectors[i].iov_len, file->n_bytes);
    return failing ? failure(io) : 0;
}

static int memory_write_at(struct io *io, int fd, const uint8_t *bytes, size_t n_bytes,
                           off_t offset)
{
    LOCKED();
    struct io_memory *memory = (struct io_memory *)io;
    bool failing = fails(io);

    if (memory->files[fd].is_direct) {
        check((uintptr_t)bytes % IO_DIRECT_ALIGNMENT == 0);
        check(offset % IO_DIRECT_SECTOR_BYTES == 0 && n_bytes % IO_DIRECT_SECTOR_BYTES == 0);
    }
    if (failing && !memory->fail_half && !memory->fail_late)
        return failure(io);
    put(&memory->files[fd], bytes, failing && memory->fail_half ? n_bytes / 2 : n_bytes,
        (size_t)offset);
    return failing ? failure(io) : 0;
}

/* It changes nothing, and does not count as a call. */
static int memory_read_at(struct io *io, int fd, uint8_t *bytes, size_t n_bytes, off_t offset)
{
    LOCKED();
    struct io_memory *memory = (struct io_memory *)io;
    const struct io_memory_file *file = &memory->files[fd];
    size_t at = (size_t)offset, n_left = at < file->n_bytes ? file->n_bytes - at : 0;
    size_t n_there = n_left < n_bytes ? n_left : n_bytes;

    if (file->is_direct)
        check((uintptr_t)bytes % IO_DIRECT_ALIGNMENT == 0);
    memset(bytes, 0, n_bytes);
    if (n_there > 0)
        memcpy(bytes, file->bytes + at, n_there);
    return 0;
}

/* From then on writes are as aligned as the seam asks for. */
static void memory_set_direct(struct io *io, int fd)
{
    LOCKED();
    ((struct io_memory *)io)->files[fd].is_direct = true;
}

static int memory_sync(struct io *io, int fd)
{
    LOCKED();
    struct io_memory *memory = (struct io_memory *)io;
    struct io_memory_file *file = &memory->files[fd];
    int r = fails(io) ? failure(io) : 0;

    if ((r < 0 && !memory->fail_late) || !syncs(io) || file->n_bytes == 0)
        return r;
    memcpy(file->durable_bytes, file->bytes, file->n_bytes);
    file->n_durable_bytes = file->n_bytes;
    file->n_writes = 0;
    return r;
}

static void memory_close(struct io *io, int fd)
{
    (void)io, (void)fd;
}

static int memory_rename(struct io *io, const char *from, const char *to)
{
    LOCKED();
    struct io_memory *memory = (struct io_memory *)io;

    if (fails(io))
        return failure(io);
    struct io_memory_entry *source = find_entry(memory->entries, from);
    if (!source)
        return -ENOENT;
    change_directory(memory, from, to, source->file);
    return 0;
}

static int memory_unlink(struct io *io, const char *name)
{
    LOCKED();
    struct io_memory *memory = (struct io_memory *)io;

    if (fails(io))
        return failure(io);
    struct io_memory_entry *entry = find_entry(memory->entries, name);
    if (!entry)
        return -ENOENT;
    change_directory(memory, name, "", entry->file);
    return 0;
}

static int memory_find(struct io *io, const char *name)
{
    LOCKED();
    return find_entry(((struct io_memory *)io)->entries, name) ? 0 : -ENOENT;
}

static int memory_sync_directory(struct io *io)
{
    LOCKED();
    struct io_memory *memory = (struct io_memory *)io;
    int r = fails(io) ? failure(io) : 0;

    if ((r < 0 && !memory->fail_late) || !syncs(io))
        return r;
    memcpy(memory->durable_entries, memory->entries, sizeof(memory->entries));
    memory->n_changes = 0;
    return r;
}

static void memory_look_again(struct io *io)
{
    (void)io;
}

static int memory_lock(struct io *io, bool is_so)
{
    struct io_memory *memory = (struct io_memory *)io;

    if (is_so && memory->is_locked_elsewhere)
        return -EAGAIN;
    memory->is_locked = is_so;
    return 0;
}

void io_memory_init(struct io_memory *memory)
{
    *memory = (struct io_memory){
        .io = {memory_create, memory_write, memory_write_at, memory_read_at, memory_set_direct,
               memory_sync, memory_sync, memory_close, memory_rename, memory_unlink, memory_find,
               memory_sync_directory, memory_look_again, memory_lock},
        .fail_error = EIO,
    };
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        memory->entries[i].file = memory->durable_entries[i].file = NO_FILE;
}

void io_memory_deinit(struct io_memory *memory)
{
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++) {
        free(memory->files[i].bytes);
        free(memory->files[i].durable_bytes);
        free(memory->files[i].writes);
    }
}

int io_memory_calls(const struct io_memory *memory)
{
    LOCKED();
    return memory->calls;
}

void io_choices_init(struct io_choices *choices)
{
    choices->sampled = false;
    choices->n = choices->n_taken = 0;
}

void io_choices_init_sampled(struct io_choices *choices, uint64_t seed)
{
    choices->sampled = true;
    choices->random = seed;
}

bool io_choices_next(struct io_choices *choices)
{
    if (choices->sampled)
        return true;
    choices->n = choices->n_taken;
    while (choices->n > 0 && choices->taken[choices->n - 1] + 1 == choices->limits[choices->n - 1])
        choices->n--;
    if (choices->n == 0)
        return false;
    choices->taken[choices->n - 1]++;
    choices->n_taken = 0;
    return true;
}

uint32_t io_choose(struct io_choices *choices, uint32_t limit)
{
    check(limit > 0);
    if (choices->sampled) {
        /* splitmix64: any seed is good. */
        uint64_t z = choices->random += UINT64_C(0x9e3779b97f4a7c15);
        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        return (uint32_t)((z ^ z >> 31) % limit);
    }
    check(choices->n_taken < IO_CHOICES_MAX);
    size_t i = choices->n_taken++;
    if (i == choices->n) {
        choices->n++;
        choices->taken[i] = 0;
        choices->limits[i] = limit;
    }
    check(choices->limits[i] == limit);
    return choices->taken[i];
}

/* Choose what a sector holds: what was synced, or any of what was written since. `first` is the
 * first write to it. */
static void choose_sector(const struct io_memory_file *from, size_t first,
                          struct io_choices *choices, struct io_memory_file *to)
{
    uint32_t sector = from->writes[first].sector, n_versions = 1;
    const struct io_memory_write *versions[IO_CHOICES_MAX];

    for (size_t i = first; i < from->n_writes; i++)
        if (from->writes[i].sector == sector)
            versions[n_versions++] = &from->writes[i];
    uint32_t version = io_choose(choices, n_versions);
    size_t offset = (size_t)sector * IO_MEMORY_SECTOR_BYTES;
    if (version > 0 && offset < to->n_bytes) {
        size_t n_bytes = to->n_bytes - offset;
        memcpy(to->bytes + offset, versions[version]->bytes,
               n_bytes < IO_MEMORY_SECTOR_BYTES ? n_bytes : IO_MEMORY_SECTOR_BYTES);
    }
}

static bool is_first_write(const struct io_memory_file *file, size_t number)
{
    for (size_t i = 0; i < number; i++)
        if (file->writes[i].sector == file->writes[number].sector)
            return false;
    return true;
}

static void choose_file(const struct io_memory_file *from, struct io_choices *choices,
                        struct io_memory_file *to)
{
    to->used = true;
    to->n_writes = 0;
    to->n_bytes = from->n_durable_bytes;
    if (from->n_bytes != from->n_durable_bytes && io_choose(choices, 2) == 1)
        to->n_bytes = from->n_bytes;
    reserve(to, to->n_bytes);
    memset(to->bytes, 0, to->n_bytes);
    size_t n_kept = from->n_durable_bytes < to->n_bytes ? from->n_durable_bytes : to->n_bytes;
    if (n_kept > 0)
        memcpy(to->bytes, from->durable_bytes, n_kept);
    for (size_t i = 0; i < from->n_writes; i++)
        if (is_first_write(from, i))
            choose_sector(from, i, choices, to);
    if (to->n_bytes > 0)
        memcpy(to->durable_bytes, to->bytes, to->n_bytes);
    to->n_durable_bytes = to->n_bytes;
}

void io_memory_lose_power(const struct io_memory *memory, struct io_choices *choices,
                          struct io_memory *after)
{
    struct io_memory_entry *entries = after->entries;

    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        after->files[i].used = false;
    memcpy(entries, memory->durable_entries, sizeof(memory->durable_entries));
    for (size_t i = 0; i < memory->n_changes; i++)
        if (io_choose(choices, 2) == 1)
            apply_change(entries, &memory->changes[i]);
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        if (strncmp(entries[i].name, "TMP", 3) == 0)
            entries[i].file = NO_FILE;
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        if (entries[i].file != NO_FILE)
            choose_file(&memory->files[entries[i].file], choices, &after->files[entries[i].file]);
    memcpy(after->durable_entries, entries, sizeof(after->durable_entries));
    after->n_changes = 0;
    after->calls = after->fail_from = after->off_from = after->syncs = 0;
}

bool io_memory_survives(const struct io_memory *io,
                        bool (*is_right)(const struct io_memory *after, const void *context),
                        const void *context)
{
    static struct io_choices choices;
    struct io_memory after;
    bool survives;

    io_memory_init(&after);
    io_choices_init(&choices);
    do {
        io_memory_lose_power(io, &choices, &after);
        survives = is_right(&after, context);
    } while (survives && io_choices_next(&choices));
    io_memory_deinit(&after);
    return survives;
}

bool io_memory_read(const struct io_memory *memory, const char *name, const uint8_t **bytes,
                    size_t *n_bytes)
{
    LOCKED();
    const struct io_memory_entry *entry =
        find_entry((struct io_memory_entry *)memory->entries, name);

    if (!entry)
        return false;
    *bytes = memory->files[entry->file].bytes;
    *n_bytes = memory->files[entry->file].n_bytes;
    return true;
}

bool io_memory_read_durable(const struct io_memory *memory, const char *name, const uint8_t **bytes,
                            size_t *n_bytes)
{
    const struct io_memory_entry *entry =
        find_entry((struct io_memory_entry *)memory->durable_entries, name);

    if (!entry)
        return false;
    *bytes = memory->files[entry->file].durable_bytes;
    *n_bytes = memory->files[entry->file].n_durable_bytes;
    return true;
}
