#include "pages.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "engine/link_types.h"

enum {
    STORE_VERSION = 1,
    N_IMAGES = IMAGE_TYPE_MAX - IMAGE_TYPE_MIN + 1,
    MEMORY_PAGE_BYTES = 4096,
    SEALS = F_SEAL_SHRINK | F_SEAL_GROW, /* a reader of a file that shrank would die of SIGBUS */
    /* A capture holds the lock for some microseconds, or for as long as the kernel lets its thread
     * wait. Yielding is enough for the first, sleeping is for the second; 10 ms in all. */
    READ_YIELDS_MAX = 16,
    READ_SLEEPS_MAX = 100,
    READ_SLEEP_NS = 100000,
};

#define STORE_MAGIC UINT64_C(0x65726f7473707476) /* "vtpstore" */

/* A sequence lock and what it guards; the sequence is odd while the image is written. */
struct control {
    uint64_t sequence;
    uint64_t generation;
    uint64_t n_bytes;
} __attribute__((aligned(64)));

struct image {
    uint64_t page_generations[IMAGE_PAGES_MAX];
    uint8_t bytes[IMAGE_BYTES_MAX];
};

struct header {
    uint64_t magic;
    uint32_t version;
    uint32_t page_bytes;
    uint64_t layout_bytes;
};

struct layout {
    struct header header;
    struct control controls[N_IMAGES];
    struct image images[N_IMAGES] __attribute__((aligned(MEMORY_PAGE_BYTES)));
};

_Static_assert(IMAGE_TYPE_MIN == (int)LINK_STATE_PERMANENT, "types are the link's");
_Static_assert(IMAGE_TYPE_MAX == (int)LINK_STATE_SAVESTATE, "types are the link's");
_Static_assert(sizeof(struct image) == 294912 && offsetof(struct layout, images) == 4096,
               "as in pages.h");

/* What the writer knows, so that it never reads back a number that it has shared. */
struct written {
    uint64_t sequence;
    uint64_t generation;
    uint64_t generation_floor;
    size_t n_bytes;
};

struct store {
    struct layout *layout;
    int fd; /* -1 unless it is this store's own */
    bool writable;
    struct written written[N_IMAGES];
};

static const struct header expected_header = {
    .magic = STORE_MAGIC,
    .version = STORE_VERSION,
    .page_bytes = PAGE_BYTES,
    .layout_bytes = sizeof(struct layout),
};

static size_t index_of(unsigned type)
{
    check(type >= IMAGE_TYPE_MIN && type <= IMAGE_TYPE_MAX);
    return type - IMAGE_TYPE_MIN;
}

static bool is_damaged(uint64_t n_bytes, uint64_t generation)
{
    return n_bytes > IMAGE_BYTES_MAX || generation > GENERATION_MAX;
}

static int check_descriptor(int fd)
{
    struct header header;
    struct stat status;

    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0)
        return errno == EINVAL ? -EBADMSG : -errno;
    if (fstat(fd, &status) < 0)
        return -errno;
    if ((seals & SEALS) != SEALS || status.st_size != sizeof(struct layout))
        return -EBADMSG;
    if (pread(fd, &header, sizeof(header), 0) != sizeof(header))
        return -EBADMSG;
    return memcmp(&header, &expected_header, sizeof(header)) == 0 ? 0 : -EBADMSG;
}

/* Go on from where the last writer stopped. */
static int load_written(struct store *store)
{
    for (size_t i = 0; i < N_IMAGES; i++) {
        const struct control *control = &store->layout->controls[i];
        store->written[i] = (struct written){
            .sequence = control->sequence,
            .generation = control->generation,
            .generation_floor = control->generation,
            .n_bytes = control->n_bytes,
        };
        if (control->sequence % 2 != 0 || is_damaged(control->n_bytes, control->generation))
            return -EBADMSG;
    }
    return 0;
}

static int map_memory(struct store *store, int fd, int flags, bool writable)
{
    int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    void *memory = mmap(NULL, sizeof(struct layout), protection, flags, fd, 0);
    if (memory == MAP_FAILED)
        return -errno;
    store->layout = memory;
    store->writable = writable;
    if (madvise(memory, sizeof(struct layout), MADV_DONTDUMP) < 0)
        return -errno;
    return writable ? load_written(store) : 0;
}

static int map_checked(struct store *store, int fd, bool writable)
{
    int r = check_descriptor(fd);

    return r < 0 ? r : map_memory(store, fd, MAP_SHARED, writable);
}

static struct store *store_alloc(void)
{
    struct store *store = calloc(1, sizeof(*store));

    if (store)
        store->fd = -1;
    return store;
}

int store_map(struct store **out, int fd, bool writable)
{
    struct store *store = store_alloc();

    if (!store)
        return -ENOMEM;
    int r = map_checked(store, fd, writable);
    if (r < 0) {
        store_free(store);
        return r;
    }
    *out = store;
    return 0;
}

int store_new_alone(struct store **out)
{
    struct store *store = store_alloc();
    if (!store)
        return -ENOMEM;
    int r = map_memory(store, -1, MAP_PRIVATE | MAP_ANONYMOUS, true);
    if (r < 0) {
        store_free(store);
        return r;
    }
    *out = store;
    return 0;
}

static int create_memory(int fd)
{
    if (ftruncate(fd, sizeof(struct layout)) < 0)
        return -errno;
    ssize_t n = pwrite(fd, &expected_header, sizeof(expected_header), 0);
    if (n != sizeof(expected_header))
        return n < 0 ? -errno : -EIO;
    return fcntl(fd, F_ADD_SEALS, SEALS | F_SEAL_SEAL) < 0 ? -errno : 0;
}

int store_new(struct store **out)
{
    int fd = memfd_create("vtpmd-store", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    int r = create_memory(fd);
    if (r >= 0)
        r = store_map(out, fd, false);
    if (r < 0) {
        close(fd);
        return r;
    }
    (*out)->fd = fd;
    return 0;
}

/* sandbox: munmap */
void store_free(struct store *store)
{
    if (!store)
        return;
    if (store->layout)
        munmap(store->layout, sizeof(struct layout));
    if (store->fd >= 0)
        close(store->fd);
    free(store);
}

int store_fd(const struct store *store)
{
    return store->fd;
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static bool is_page_equal(const uint8_t *a, const uint8_t *b)
{
    uint64_t words_a[PAGE_BYTES / 8], words_b[PAGE_BYTES / 8], differences = 0;

    /* Of a constant size, so that these are loads and no calls. */
    memcpy(words_a, a, PAGE_BYTES);
    memcpy(words_b, b, PAGE_BYTES);
    for (size_t i = 0; i < PAGE_BYTES / 8; i++)
        differences |= words_a[i] ^ words_b[i];
    return differences == 0;
}

/* Returns the first page in which the images differ, at most the one that holds `n_bytes`. */
static size_t first_changed_page(const uint8_t *a, const uint8_t *b, size_t n_bytes)
{
    size_t page = 0;

    while ((page + 1) * PAGE_BYTES <= n_bytes &&
           is_page_equal(a + page * PAGE_BYTES, b + page * PAGE_BYTES))
        page++;
    return page;
}

static void copy_changed_pages(struct image *image, size_t old_bytes, const uint8_t *bytes,
                               size_t n_bytes, size_t first_page, uint64_t generation)
{
    for (size_t page = first_page; page * PAGE_BYTES < n_bytes; page++) {
        size_t offset = page * PAGE_BYTES;
        size_t length = smaller(PAGE_BYTES, n_bytes - offset);
        size_t old_length = offset < old_bytes ? smaller(PAGE_BYTES, old_bytes - offset) : 0;
        if (length == old_length && memcmp(image->bytes + offset, bytes + offset, length) == 0)
            continue;
        memcpy(image->bytes + offset, bytes + offset, length);
        image->page_generations[page] = generation;
    }
    if (old_bytes > n_bytes)
        explicit_bzero(image->bytes + n_bytes, old_bytes - n_bytes);
}

int store_capture(struct store *store, unsigned type, const uint8_t *bytes, size_t n_bytes,
                  uint64_t *generation)
{
    struct written *written = &store->written[index_of(type)];
    struct control *control = &store->layout->controls[index_of(type)];
    struct image *image = &store->layout->images[index_of(type)];

    check(store->writable);
    if (n_bytes > IMAGE_BYTES_MAX)
        return -EMSGSIZE;
    size_t compared = smaller(n_bytes, written->n_bytes);
    size_t page = first_changed_page(image->bytes, bytes, compared);
    size_t same = page * PAGE_BYTES;
    *generation = written->generation;
    if (n_bytes == written->n_bytes &&
        (same == n_bytes || memcmp(image->bytes + same, bytes + same, n_bytes - same) == 0))
        return 0;
    if (written->generation_floor >= GENERATION_MAX)
        return -EOVERFLOW;
    *generation = ++written->generation_floor;

    __atomic_store_n(&control->sequence, ++written->sequence, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    copy_changed_pages(image, written->n_bytes, bytes, n_bytes, page, *generation);
    written->n_bytes = n_bytes;
    written->generation = *generation;
    __atomic_store_n(&control->n_bytes, n_bytes, __ATOMIC_RELAXED);
    __atomic_store_n(&control->generation, *generation, __ATOMIC_RELAXED);
    __atomic_store_n(&control->sequence, ++written->sequence, __ATOMIC_RELEASE);
    return 0;
}

void store_raise_generation(struct store *store, unsigned type, uint64_t floor)
{
    struct written *written = &store->written[index_of(type)];

    check(store->writable && floor <= GENERATION_MAX);
    if (written->generation_floor < floor)
        written->generation_floor = floor;
}

int store_take_generation(struct store *store, unsigned type, uint64_t *generation)
{
    struct written *written = &store->written[index_of(type)];

    check(store->writable);
    if (written->generation_floor >= GENERATION_MAX)
        return -EOVERFLOW;
    *generation = ++written->generation_floor;
    return 0;
}

uint64_t store_next_generation(const struct store *store, unsigned type, uint64_t floor)
{
    uint64_t taken = store->written[index_of(type)].generation_floor;

    check(store->writable && floor <= GENERATION_MAX);
    return (taken < floor ? floor : taken) + 1;
}

/* One image as a reader sees it; the numbers are copies and within their limits. */
struct view {
    const struct image *image;
    uint64_t generation;
    size_t n_bytes;
};

static void wait_for_writer(unsigned attempt)
{
    struct timespec sleep = {.tv_nsec = READ_SLEEP_NS};

    if (attempt < READ_YIELDS_MAX)
        sched_yield();
    else
        nanosleep(&sleep, NULL);
}

/* Let `copy` take what it wants of an image, again until nothing was written meanwhile. */
static int read_consistently(struct store *store, unsigned type,
                             void (*copy)(const struct view *view, void *context), void *context)
{
    const struct control *control = &store->layout->controls[index_of(type)];
    struct view view = {.image = &store->layout->images[index_of(type)]};

    for (unsigned attempt = 0; attempt < READ_YIELDS_MAX + READ_SLEEPS_MAX; attempt++) {
        uint64_t sequence = __atomic_load_n(&control->sequence, __ATOMIC_ACQUIRE);
        if (sequence % 2 == 0) {
            view.n_bytes = __atomic_load_n(&control->n_bytes, __ATOMIC_RELAXED);
            view.generation = __atomic_load_n(&control->generation, __ATOMIC_RELAXED);
            bool damaged = is_damaged(view.n_bytes, view.generation);
            if (!damaged)
                copy(&view, context);
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            if (__atomic_load_n(&control->sequence, __ATOMIC_RELAXED) == sequence)
                return damaged ? STORE_DAMAGED : 0;
        }
        wait_for_writer(attempt);
    }
    return STORE_BUSY;
}

struct read_target {
    uint8_t *out;
    size_t n_bytes;
    uint64_t generation;
};

static void copy_image(const struct view *view, void *context)
{
    struct read_target *target = context;

    target->n_bytes = view->n_bytes;
    target->generation = view->generation;
    if (target->out)
        memcpy(target->out, view->image->bytes, view->n_bytes);
}

int store_read(struct store *store, unsigned type, uint8_t *out, size_t *n_bytes,
               uint64_t *generation)
{
    struct read_target target = {.out = out};

    int r = read_consistently(store, type, copy_image, &target);
    if (r != 0)
        return r;
    *n_bytes = target.n_bytes;
    *generation = target.generation;
    return 0;
}

struct collect_target {
    uint64_t since;
    struct store_changes *changes;
};

static void copy_ranges(const struct view *view, void *context)
{
    const struct collect_target *target = context;
    struct store_changes *changes = target->changes;
    uint32_t n_bytes = 0, n_ranges = 0, n_image = (uint32_t)view->n_bytes;
    bool adjacent = false;

    for (uint32_t offset = 0; offset < n_image; offset += PAGE_BYTES) {
        const uint64_t *page_generation = &view->image->page_generations[offset / PAGE_BYTES];
        bool changed = __atomic_load_n(page_generation, __ATOMIC_RELAXED) > target->since;
        if (changed) {
            uint32_t length = (uint32_t)smaller(PAGE_BYTES, n_image - offset);
            if (!adjacent)
                changes->ranges[n_ranges++] = (struct store_range){.offset = offset};
            changes->ranges[n_ranges - 1].n_bytes += length;
            n_bytes += length;
        }
        adjacent = changed;
    }
    changes->generation = view->generation;
    changes->image_bytes = n_image;
    changes->n_bytes = n_bytes;
    changes->n_ranges = n_ranges;
}

int store_collect(struct store *store, unsigned type, uint64_t since, struct store_changes *changes)
{
    struct collect_target target = {.since = since, .changes = changes};

    return read_consistently(store, type, copy_ranges, &target);
}
