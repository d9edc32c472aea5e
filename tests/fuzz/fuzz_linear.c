/* Fuzz the header of a linear file, and what is written into a file that begins with it.
 *
 *   build/sanitize/fuzz_linear -max_total_time=60 tests/fuzz/corpus/linear
 *
 * An input is the file's length in KiB, whether it is fixed, the header without its first twelve
 * bytes, and then operations: which state, and the length in units of 64 bytes to write, or 0 to
 * remove it. The oracle:
 *   - data of a header that is accepted is in the file, behind the header, and apart,
 *   - it says the same when it is written again,
 *   - whatever is done to one state, another stays as it was.
 */
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "checkpoint.h"
#include "io_memory.h"
#include "linear.h"

enum {
    LENGTH_UNIT_BYTES = 64,
    STATE_BYTES_MAX = UINT8_MAX * LENGTH_UNIT_BYTES,
    FILE_BYTES_MAX = UINT8_MAX << 10,
};

static const char *const names[LINEAR_STATES] = {"permall", "volatilestate", "savestate"};
static uint8_t file[FILE_BYTES_MAX], state_bytes[STATE_BYTES_MAX];

static void check_header(const struct linear_header *header, uint64_t file_bytes)
{
    uint8_t bytes[LINEAR_HEADER_BYTES];
    struct linear_header again;

    for (size_t i = 0; i < LINEAR_STATES; i++) {
        const struct linear_extent *data = &header->states[i];
        if (data->n_bytes == 0)
            continue;
        check(data->offset >= LINEAR_HEADER_BYTES);
        check((uint64_t)data->offset + data->n_bytes <= file_bytes);
        for (size_t k = 0; k < i; k++) {
            const struct linear_extent *other = &header->states[k];
            check(other->n_bytes == 0 || other->offset + other->n_bytes <= data->offset ||
                  data->offset + data->n_bytes <= other->offset);
        }
    }
    linear_encode(header, file_bytes, bytes);
    check(linear_decode(bytes, sizeof(bytes), file_bytes, &again) == LINEAR_NOTHING);
    for (size_t i = 0; i < LINEAR_STATES; i++)
        check(again.states[i].n_bytes == header->states[i].n_bytes &&
              (again.states[i].n_bytes == 0 || again.states[i].offset == header->states[i].offset));
}

static void read_header(const struct io_memory *io, struct linear_header *header,
                        const uint8_t **bytes)
{
    size_t n_bytes;

    check(io_memory_read(io, "file", bytes, &n_bytes));
    check(linear_decode(*bytes, n_bytes, n_bytes, header) == LINEAR_NOTHING);
    check_header(header, n_bytes);
}

/* What was read before has been given back by then, as the file has grown: so copies. */
static void do_one(struct io_memory *io, struct linear *linear, size_t state, size_t n_bytes)
{
    static uint8_t before[FILE_BYTES_MAX + (64 << 20)];
    struct linear_header header, next;
    const uint8_t *bytes;

    read_header(io, &header, &bytes);
    for (size_t i = 0; i < LINEAR_STATES; i++)
        memcpy(before + header.states[i].offset, bytes + header.states[i].offset,
               header.states[i].n_bytes);
    if (n_bytes == 0 && state > 0)
        check(checkpoint_remove(&linear->io, names[state]) == 0);
    else
        checkpoint_write(&linear->io, NULL, names[state], state_bytes, n_bytes, NULL);
    read_header(io, &next, &bytes);
    for (size_t i = 0; i < LINEAR_STATES; i++)
        check(i == state || (next.states[i].n_bytes == header.states[i].n_bytes &&
                             memcmp(bytes + next.states[i].offset, before + header.states[i].offset,
                                    next.states[i].n_bytes) == 0));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_data);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_data)
{
    enum { OTHERS_BYTES = LINEAR_HEADER_BYTES - LINEAR_AT_SLOTS };
    struct linear_header none = {0};
    struct io_memory io;
    struct linear linear;

    if (n_data < 2 + OTHERS_BYTES || data[0] == 0)
        return 0;
    uint64_t file_bytes = (uint64_t)data[0] << 10;
    bool is_fixed = data[1] & 1;
    memset(file, 0x5a, sizeof(file));
    linear_encode(&none, file_bytes, file);
    memcpy(file + LINEAR_AT_SLOTS, data + 2, OTHERS_BYTES);
    io_memory_init(&io);
    int fd = io.io.create(&io.io, "file");
    check(io.io.write_at(&io.io, fd, file, file_bytes, 0) == 0);
    if (linear_init(&linear, &io.io, fd, file_bytes, is_fixed) == LINEAR_NOTHING) {
        for (size_t i = 2 + OTHERS_BYTES; i + 2 <= n_data && i < 40 + OTHERS_BYTES; i += 2)
            do_one(&io, &linear, data[i] % LINEAR_STATES, (size_t)data[i + 1] * LENGTH_UNIT_BYTES);
        linear_deinit(&linear);
    }
    io_memory_deinit(&io);
    return 0;
}
