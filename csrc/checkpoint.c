#include "checkpoint.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "bytes.h"
#include "check.h"

enum {
    HEADER_BYTES = 10,
    TLV_BYTES = 6, /* before its data */
    FLAG_ENCRYPTED = 0x01,
    FLAG_256_BIT_KEY = 0x08,
};

enum tag {
    TAG_DATA = 1,
    TAG_ENCRYPTED_DATA = 2,
    TAG_HMAC = 3,
    TAG_IV = 6,
};

static void format_name(char *out, const char *prefix, const char *name)
{
    int length = snprintf(out, CHECKPOINT_NAME_BYTES_MAX, "%s2-00.%s", prefix, name);
    check(length > 0 && length < CHECKPOINT_NAME_BYTES_MAX);
}

static uint8_t *put_tlv(uint8_t *out, enum tag tag, size_t n_bytes)
{
    put_be16(out, tag);
    put_be32(out + 2, (uint32_t)n_bytes);
    return out + TLV_BYTES;
}

/* Write the header and the first TLV's; `file_bytes` is the length of all that follows, too. */
static void format_header(uint8_t *out, uint16_t flags, size_t file_bytes, enum tag tag,
                          size_t data_bytes)
{
    check(file_bytes <= UINT32_MAX);
    out[0] = 2;
    out[1] = 1;
    put_be16(out + 2, HEADER_BYTES);
    put_be16(out + 4, flags);
    put_be32(out + 6, (uint32_t)file_bytes);
    put_tlv(out + HEADER_BYTES, tag, data_bytes);
}

static int write_temporary(struct io *io, const char *name, struct iovec *vectors, int n_vectors)
{
    int fd = io->create(io, name, CHECKPOINT_MODE);
    if (fd < 0)
        return fd;
    int r = io->write(io, fd, vectors, n_vectors);
    if (r >= 0)
        r = io->sync(io, fd);
    io->close(io, fd);
    return r;
}

static int write_plain(struct io *io, const char *name, const uint8_t *state, size_t state_bytes)
{
    uint8_t header[CHECKPOINT_HEADER_BYTES];
    struct iovec vectors[] = {
        {.iov_base = header, .iov_len = sizeof(header)},
        {.iov_base = (void *)state, .iov_len = state_bytes},
    };

    format_header(header, 0, sizeof(header) + state_bytes, TAG_DATA, state_bytes);
    return write_temporary(io, name, vectors, 2);
}

static int write_encrypted(struct io *io, const struct cipher_key *key, const char *name,
                           const uint8_t *state, size_t state_bytes)
{
    uint16_t flags = FLAG_ENCRYPTED | (key->n_bytes == 32 ? FLAG_256_BIT_KEY : 0);
    uint8_t header[CHECKPOINT_HEADER_BYTES];
    uint8_t trailer[TLV_BYTES + DIGEST_BYTES + TLV_BYTES + CIPHER_KEY_BYTES_MAX];
    cleanup(cipher_output_deinit) struct cipher_output sealed = {0};

    int r = cipher_encrypt(key, state, state_bytes, &sealed);
    if (r < 0)
        return r;
    uint8_t *mac = put_tlv(trailer, TAG_HMAC, sizeof(sealed.mac));
    memcpy(mac, sealed.mac, sizeof(sealed.mac));
    uint8_t *iv = put_tlv(mac + sizeof(sealed.mac), TAG_IV, key->n_bytes);
    memcpy(iv, sealed.iv, key->n_bytes);
    size_t trailer_bytes = (size_t)(iv - trailer) + key->n_bytes;
    format_header(header, flags, sizeof(header) + sealed.n_bytes + trailer_bytes,
                  TAG_ENCRYPTED_DATA, sealed.n_bytes);
    struct iovec vectors[] = {
        {.iov_base = header, .iov_len = sizeof(header)},
        {.iov_base = sealed.ciphertext, .iov_len = sealed.n_bytes},
        {.iov_base = trailer, .iov_len = trailer_bytes},
    };
    return write_temporary(io, name, vectors, 3);
}

int checkpoint_write(struct io *io, const struct cipher_key *key, const char *name,
                     const uint8_t *state, size_t state_bytes)
{
    char temporary[CHECKPOINT_NAME_BYTES_MAX], final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(temporary, "TMP", name);
    format_name(final, "tpm", name);
    int r = key ? write_encrypted(io, key, temporary, state, state_bytes)
                : write_plain(io, temporary, state, state_bytes);
    if (r >= 0)
        r = io->rename(io, temporary, final);
    if (r < 0) {
        io->unlink(io, temporary);
        return r;
    }
    return io->sync_directory(io);
}

int checkpoint_remove(struct io *io, const char *name)
{
    char final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(final, "tpm", name);
    int r = io->unlink(io, final);
    if (r == -ENOENT)
        return 0;
    return r < 0 ? r : io->sync_directory(io);
}
