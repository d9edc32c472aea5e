#include "io_memory.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static bool fails(struct io *io)
{
    struct io_memory *memory = (struct io_memory *)io;

    memory->calls++;
    return memory->fail_from && memory->calls >= memory->fail_from;
}

static int failure(struct io *io)
{
    return -((struct io_memory *)io)->fail_error;
}

static struct io_memory_file *find(struct io_memory *memory, const char *name)
{
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        if (strcmp(memory->files[i].name, name) == 0)
            return &memory->files[i];
    return NULL;
}

static struct io_memory_file *find_unused(struct io_memory *memory)
{
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        if (!memory->files[i].name[0] && !memory->files[i].durable_name[0])
            return &memory->files[i];
    return NULL;
}

static int memory_create(struct io *io, const char *name, mode_t mode)
{
    struct io_memory *memory = (struct io_memory *)io;

    (void)mode;
    if (fails(io))
        return failure(io);
    struct io_memory_file *old = find(memory, name);
    if (old)
        old->name[0] = '\0';
    struct io_memory_file *file = find_unused(memory);
    check(file);
    snprintf(file->name, sizeof(file->name), "%s", name);
    file->n_bytes = file->n_durable_bytes = 0;
    return (int)(file - memory->files);
}

static int memory_write(struct io *io, int fd, struct iovec *vectors, int n_vectors)
{
    struct io_memory_file *file = &((struct io_memory *)io)->files[fd];

    if (fails(io))
        return failure(io);
    for (int i = 0; i < n_vectors; i++) {
        check(file->n_bytes + vectors[i].iov_len <= IO_MEMORY_FILE_BYTES_MAX);
        memcpy(file->bytes + file->n_bytes, vectors[i].iov_base, vectors[i].iov_len);
        file->n_bytes += vectors[i].iov_len;
    }
    return 0;
}

static int memory_sync(struct io *io, int fd)
{
    struct io_memory *memory = (struct io_memory *)io;
    struct io_memory_file *file = &memory->files[fd];

    if (fails(io))
        return failure(io);
    if (memory->forget_syncs)
        return 0;
    memcpy(file->durable_bytes, file->bytes, file->n_bytes);
    file->n_durable_bytes = file->n_bytes;
    return 0;
}

static void memory_close(struct io *io, int fd)
{
    (void)io, (void)fd;
}

static int memory_rename(struct io *io, const char *from, const char *to)
{
    struct io_memory *memory = (struct io_memory *)io;

    if (fails(io))
        return failure(io);
    struct io_memory_file *source = find(memory, from), *target = find(memory, to);
    if (!source)
        return -ENOENT;
    if (target)
        target->name[0] = '\0';
    snprintf(source->name, sizeof(source->name), "%s", to);
    return 0;
}

static int memory_unlink(struct io *io, const char *name)
{
    if (fails(io))
        return failure(io);
    struct io_memory_file *file = find((struct io_memory *)io, name);
    if (!file)
        return -ENOENT;
    file->name[0] = '\0';
    return 0;
}

static int memory_sync_directory(struct io *io)
{
    struct io_memory *memory = (struct io_memory *)io;

    if (fails(io))
        return failure(io);
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++)
        memcpy(memory->files[i].durable_name, memory->files[i].name, sizeof(memory->files[i].name));
    return 0;
}

void io_memory_init(struct io_memory *memory)
{
    *memory = (struct io_memory){
        .io = {memory_create, memory_write, memory_sync, memory_close, memory_rename, memory_unlink,
               memory_sync_directory},
        .fail_error = EIO,
    };
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++) {
        memory->files[i].bytes = malloc(IO_MEMORY_FILE_BYTES_MAX);
        memory->files[i].durable_bytes = malloc(IO_MEMORY_FILE_BYTES_MAX);
        check(memory->files[i].bytes && memory->files[i].durable_bytes);
    }
}

void io_memory_deinit(struct io_memory *memory)
{
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++) {
        free(memory->files[i].bytes);
        free(memory->files[i].durable_bytes);
    }
}

bool io_memory_read(struct io_memory *memory, const char *name, const uint8_t **bytes,
                    size_t *n_bytes)
{
    struct io_memory_file *file = find(memory, name);

    if (!file)
        return false;
    *bytes = file->bytes;
    *n_bytes = file->n_bytes;
    return true;
}

bool io_memory_read_after_power_loss(struct io_memory *memory, const char *name, int survivors,
                                     uint8_t *bytes, size_t *n_bytes)
{
    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++) {
        struct io_memory_file *file = &memory->files[i];
        if (strcmp(survivors & SURVIVE_DIRECTORY ? file->name : file->durable_name, name) != 0)
            continue;
        memcpy(bytes, file->durable_bytes, file->n_durable_bytes);
        *n_bytes = file->n_durable_bytes;
        if (survivors & (SURVIVE_CONTENT | SURVIVE_HALF)) {
            size_t unsynced = file->n_bytes - file->n_durable_bytes;
            size_t kept = survivors & SURVIVE_HALF ? unsynced / 2 : unsynced;
            *n_bytes = file->n_durable_bytes + kept;
            memcpy(bytes, file->bytes, *n_bytes);
        }
        return true;
    }
    return false;
}
