#include "checkpoint.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "bytes.h"
#include "check.h"

static void format_name(char *out, const char *prefix, const char *name)
{
    int length = snprintf(out, CHECKPOINT_NAME_BYTES_MAX, "%s2-00.%s", prefix, name);
    check(length > 0 && length < CHECKPOINT_NAME_BYTES_MAX);
}

enum {
    HEADER_BYTES = 10,
    VERSION = 2,
    MINIMUM_VERSION = 1,
    MINIMUM_VERSION_CONTINUED = 255,
    FLAG_ENCRYPTED = 0x01,
    FLAG_256_BIT_KEY = 0x08,
    TLV_BYTES = 6, /* before its data */
    AFTER_BYTES_MAX =
        TLV_BYTES + DIGEST_BYTES + TLV_BYTES + CIPHER_KEY_BYTES_MAX + CHECKPOINT_LINEAGE_BYTES,
};

enum tag {
    TAG_DATA = 1,
    TAG_ENCRYPTED_DATA = 2,
    TAG_HMAC = 3,
    TAG_IV = 6,
    TAG_LINEAGE = 0x5654,
};

/* A file, as it is written. */
struct file {
    uint8_t before[CHECKPOINT_HEADER_BYTES];
    const uint8_t *data; /* of the first TLV */
    size_t data_bytes;
    uint8_t after[AFTER_BYTES_MAX];
    size_t after_bytes;
};

static void format_tlv(uint8_t *out, enum tag tag, size_t n_bytes)
{
    put_be16(out, tag);
    put_be32(out + 2, (uint32_t)n_bytes);
}

static void add_tlv(struct file *file, enum tag tag, const uint8_t *bytes, size_t n_bytes)
{
    uint8_t *out = file->after + file->after_bytes;

    check(n_bytes + TLV_BYTES <= sizeof(file->after) - file->after_bytes);
    format_tlv(out, tag, n_bytes);
    memcpy(out + TLV_BYTES, bytes, n_bytes);
    file->after_bytes += TLV_BYTES + n_bytes;
}

static void add_lineage(struct file *file, const struct checkpoint_lineage *lineage)
{
    uint8_t bytes[CHECKPOINT_LINEAGE_BYTES - TLV_BYTES];

    memcpy(bytes, lineage->identity, CHECKPOINT_IDENTITY_BYTES);
    put_be64(bytes + CHECKPOINT_IDENTITY_BYTES, lineage->generation);
    add_tlv(file, TAG_LINEAGE, bytes, sizeof(bytes));
}

/* After all else, as it has the length. */
static void format_header(struct file *file, uint16_t flags, enum tag tag, bool continued)
{
    uint8_t *header = file->before;
    size_t file_bytes = sizeof(file->before) + file->data_bytes + file->after_bytes;

    check(file_bytes <= UINT32_MAX);
    header[0] = VERSION;
    header[1] = continued ? MINIMUM_VERSION_CONTINUED : MINIMUM_VERSION;
    put_be16(header + 2, HEADER_BYTES);
    put_be16(header + 4, flags);
    put_be32(header + 6, (uint32_t)file_bytes);
    format_tlv(header + HEADER_BYTES, tag, file->data_bytes);
}

static int write_content(struct io *io, int fd, struct file *file)
{
    struct iovec vectors[] = {
        {file->before, sizeof(file->before)},
        {(void *)file->data, file->data_bytes},
        {file->after, file->after_bytes},
    };

    int r = io->write(io, fd, vectors, 3);
    return r < 0 ? r : io->sync(io, fd);
}

static int write_temporary(struct io *io, const char *name, struct file *file)
{
    char temporary[CHECKPOINT_NAME_BYTES_MAX];

    format_name(temporary, "TMP", name);
    int fd = io->create(io, temporary, CHECKPOINT_MODE);
    if (fd < 0)
        return fd;
    int r = write_content(io, fd, file);
    io->close(io, fd);
    if (r < 0)
        io->unlink(io, temporary);
    return r;
}

int checkpoint_prepare(struct io *io, const struct cipher_key *key, const char *name,
                       const uint8_t *state, size_t state_bytes,
                       const struct checkpoint_lineage *lineage)
{
    struct file file = {.data = state, .data_bytes = state_bytes};
    cleanup(cipher_output_deinit) struct cipher_output sealed = {0};
    uint16_t flags = 0;

    if (key) {
        int r = cipher_encrypt(key, state, state_bytes, &sealed);
        if (r < 0)
            return r;
        flags = FLAG_ENCRYPTED | (key->n_bytes == 32 ? FLAG_256_BIT_KEY : 0);
        file.data = sealed.ciphertext;
        file.data_bytes = sealed.n_bytes;
        add_tlv(&file, TAG_HMAC, sealed.mac, sizeof(sealed.mac));
        add_tlv(&file, TAG_IV, sealed.iv, key->n_bytes);
    }
    if (lineage)
        add_lineage(&file, lineage);
    format_header(&file, flags, key ? TAG_ENCRYPTED_DATA : TAG_DATA, lineage && lineage->continued);
    return write_temporary(io, name, &file);
}

int checkpoint_publish(struct io *io, const char *name)
{
    char temporary[CHECKPOINT_NAME_BYTES_MAX], final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(temporary, "TMP", name);
    format_name(final, "tpm", name);
    int r = io->rename(io, temporary, final);
    if (r < 0) {
        io->unlink(io, temporary);
        return r;
    }
    return io->sync_directory(io);
}

int checkpoint_write(struct io *io, const struct cipher_key *key, const char *name,
                     const uint8_t *state, size_t state_bytes,
                     const struct checkpoint_lineage *lineage)
{
    int r = checkpoint_prepare(io, key, name, state, state_bytes, lineage);

    return r < 0 ? r : checkpoint_publish(io, name);
}

int checkpoint_remove(struct io *io, const char *name)
{
    char final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(final, "tpm", name);
    int r = io->unlink(io, final);
    if (r < 0 && r != -ENOENT)
        return r;
    return io->sync_directory(io); /* a removal before may not have been synced */
}
