/* Times the store and the delta record on two images of a state, as they follow each other.
 *
 *   store ROUNDS TYPE BASE NEXT
 *
 * BASE and NEXT are files. Writes a line of JSON: the sizes, and for each operation its nanoseconds
 * in each round. Exit status: 0 measured, 1 something failed, 2 usage.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "delta.h"
#include "pages.h"

enum {
    ROUNDS_MAX = 100000,
    WARM_UP_ROUNDS = 20,
};

enum operation {
    CAPTURE_UNCHANGED,
    CAPTURE_CHANGED,
    COLLECT,
    READ,
    ENCODE,
    ENCODE_BASE_DIGEST_KNOWN,
    APPLY,
    N_OPERATIONS,
};

static const char *const names[N_OPERATIONS] = {
    [CAPTURE_UNCHANGED] = "capture_unchanged",
    [CAPTURE_CHANGED] = "capture_changed",
    [COLLECT] = "collect",
    [READ] = "read",
    [ENCODE] = "encode",
    [ENCODE_BASE_DIGEST_KNOWN] = "encode_base_digest_known",
    [APPLY] = "apply",
};

struct measurement {
    unsigned type;
    unsigned n_rounds;
    struct delta_image base, next;
    struct image_digest base_digest;
    struct store *store, *writer;
    uint64_t *times_ns[N_OPERATIONS];
    size_t record_bytes;
    uint32_t changed_bytes; /* in pages */
};

static uint8_t images[2][IMAGE_BYTES_MAX], out[IMAGE_BYTES_MAX], record[DELTA_RECORD_BYTES_MAX];
static struct store_changes changes;

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static struct delta_image read_image(const char *path, uint8_t *bytes, uint64_t generation)
{
    FILE *file = fopen(path, "rb");

    if (!file) {
        perror(path);
        exit(1);
    }
    size_t n_bytes = fread(bytes, 1, IMAGE_BYTES_MAX, file);
    check(n_bytes > 0 && !ferror(file));
    fclose(file);
    return (struct delta_image){.bytes = bytes, .n_bytes = n_bytes, .generation = generation};
}

#define TIME(operation, call)                                                                      \
    do {                                                                                           \
        uint64_t start_ns = now_ns();                                                              \
        check((call) == 0);                                                                        \
        times_ns[operation] = now_ns() - start_ns;                                                 \
    } while (0)

static void measure_store(struct measurement *m, uint64_t times_ns[N_OPERATIONS])
{
    uint64_t generation, before;
    size_t n_bytes;

    check(store_capture(m->writer, m->type, m->base.bytes, m->base.n_bytes, &before) == 0);
    TIME(CAPTURE_CHANGED,
         store_capture(m->writer, m->type, m->next.bytes, m->next.n_bytes, &generation));
    TIME(CAPTURE_UNCHANGED,
         store_capture(m->writer, m->type, m->next.bytes, m->next.n_bytes, &generation));
    TIME(COLLECT, store_collect(m->store, m->type, before, &changes));
    TIME(READ, store_read(m->store, m->type, out, &n_bytes, &generation));
    check(generation == before + 1 && n_bytes == m->next.n_bytes);
    check(memcmp(out, m->next.bytes, n_bytes) == 0);
    m->changed_bytes = changes.n_bytes;
}

static void measure_delta(struct measurement *m, uint64_t times_ns[N_OPERATIONS])
{
    struct delta_header header;
    struct image_digest digest;
    struct delta_image known = m->base;
    size_t n_bytes;

    known.digest = &m->base_digest;
    TIME(ENCODE, delta_encode(m->type, &m->base, &m->next, record, &n_bytes));
    m->record_bytes = n_bytes;
    TIME(ENCODE_BASE_DIGEST_KNOWN, delta_encode(m->type, &known, &m->next, record, &n_bytes));
    check(n_bytes == m->record_bytes);
    TIME(APPLY, delta_apply(m->type, &m->base, record, n_bytes, out, &header, &digest));
    check(header.result_bytes == m->next.n_bytes);
    check(memcmp(out, m->next.bytes, m->next.n_bytes) == 0);
}

static void measure(struct measurement *m)
{
    uint64_t times_ns[N_OPERATIONS];

    check(image_digest_compute(
              &(struct delta_image){.bytes = m->base.bytes, .n_bytes = m->base.n_bytes}, NULL,
              &m->base_digest) == 0);
    for (unsigned round = 0; round < WARM_UP_ROUNDS + m->n_rounds; round++) {
        measure_store(m, times_ns);
        measure_delta(m, times_ns);
        for (int i = 0; round >= WARM_UP_ROUNDS && i < N_OPERATIONS; i++)
            m->times_ns[i][round - WARM_UP_ROUNDS] = times_ns[i];
    }
}

static void print(const struct measurement *m)
{
    printf("{\"image_bytes\": %zu, \"record_bytes\": %zu, \"changed_bytes\": %" PRIu32
           ", \"ns\": {",
           m->next.n_bytes, m->record_bytes, m->changed_bytes);
    for (int i = 0; i < N_OPERATIONS; i++) {
        printf("%s\"%s\": [", i ? ", " : "", names[i]);
        for (unsigned round = 0; round < m->n_rounds; round++)
            printf("%s%" PRIu64, round ? ", " : "", m->times_ns[i][round]);
        printf("]");
    }
    printf("}}\n");
}

int main(int argc, char **argv)
{
    struct measurement m = {0};

    if (argc == 5) {
        m.n_rounds = (unsigned)strtoul(argv[1], NULL, 10);
        m.type = (unsigned)strtoul(argv[2], NULL, 10);
    }
    if (m.n_rounds < 1 || m.n_rounds > ROUNDS_MAX || m.type < IMAGE_TYPE_MIN ||
        m.type > IMAGE_TYPE_MAX) {
        fprintf(stderr, "usage: store ROUNDS TYPE BASE NEXT\n");
        return 2;
    }
    m.base = read_image(argv[3], images[0], 1);
    m.next = read_image(argv[4], images[1], 2);
    for (int i = 0; i < N_OPERATIONS; i++)
        check(m.times_ns[i] = calloc(m.n_rounds, sizeof(*m.times_ns[i])));
    check(store_new(&m.store) == 0);
    check(store_map(&m.writer, store_fd(m.store), true) == 0);
    measure(&m);
    print(&m);
    store_free(m.writer);
    store_free(m.store);
    for (int i = 0; i < N_OPERATIONS; i++)
        free(m.times_ns[i]);
    return 0;
}
