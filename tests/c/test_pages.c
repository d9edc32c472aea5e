/* The store: what a reader sees is one capture whole, or an error, whatever the writer does.
 *
 * Invariant 8: what the writer puts into shared memory is held against limits before it is used.
 * Invariant 10: generations only grow.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "pages.h"

/* Where things are in the memory, as pages.h says, for a writer that is up to no good. */
enum {
    LAYOUT_BYTES = 4096 + 3 * 294912,
    HEADER_BYTES = 24,
    CONTROL_OFFSET = 64, /* of the permanent image: sequence, generation, length */
    IMAGE_OFFSET = 36864,
    TYPE = 1,
};

static struct store *reader, *writer;
static uint8_t *raw; /* the memory as a hostile writer maps it */
static uint8_t out[IMAGE_BYTES_MAX], image[IMAGE_BYTES_MAX];
static struct store_changes changes;

static int set_up(void **state)
{
    (void)state;
    assert_int_equal(store_new(&reader), 0);
    assert_int_equal(store_map(&writer, store_fd(reader), true), 0);
    raw = mmap(NULL, LAYOUT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, store_fd(reader), 0);
    assert_ptr_not_equal(raw, MAP_FAILED);
    for (size_t i = 0; i < sizeof(image); i++)
        image[i] = (uint8_t)(i * 7 + i / 256);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    munmap(raw, LAYOUT_BYTES);
    store_free(writer);
    store_free(reader);
    return 0;
}

static uint64_t capture(const uint8_t *bytes, size_t n_bytes)
{
    uint64_t generation;

    assert_int_equal(store_capture(writer, TYPE, bytes, n_bytes, &generation), 0);
    return generation;
}

static void assert_reads(const uint8_t *bytes, size_t n_bytes, uint64_t generation)
{
    uint64_t read_generation;
    size_t read_bytes;

    assert_int_equal(store_read(reader, TYPE, out, &read_bytes, &read_generation), 0);
    assert_int_equal(read_bytes, n_bytes);
    assert_int_equal(read_generation, generation);
    assert_memory_equal(out, bytes, n_bytes);
}

static int read_result(void)
{
    uint64_t generation;
    size_t n_bytes;

    return store_read(reader, TYPE, out, &n_bytes, &generation);
}

static void an_image_is_read_as_it_was_captured(void **state)
{
    (void)state;
    assert_reads(image, 0, 0);
    assert_int_equal(capture(image, 0), 0);
    assert_int_equal(capture(image, 1000), 1);
    assert_reads(image, 1000, 1);
    assert_int_equal(capture(image, 1000), 1);
    image[999]++;
    assert_int_equal(capture(image, 1000), 2);
    assert_reads(image, 1000, 2);
    assert_int_equal(capture(image, IMAGE_BYTES_MAX), 3);
    assert_reads(image, IMAGE_BYTES_MAX, 3);
    assert_int_equal(capture(image, 0), 4);
    assert_reads(image, 0, 4);
}

static void every_byte_of_a_page_counts(void **state)
{
    (void)state;
    for (size_t i = 0; i < 200; i++) {
        uint64_t before = capture(image, 200);
        image[i] ^= 1;
        assert_int_equal(capture(image, 200), before + 1);
        assert_reads(image, 200, before + 1);
        assert_int_equal(store_collect(reader, TYPE, before, &changes), 0);
        assert_int_equal(changes.n_ranges, 1);
        assert_int_equal(changes.ranges[0].offset, i / PAGE_BYTES * PAGE_BYTES);
    }
}

static void types_are_apart(void **state)
{
    uint64_t generation;
    size_t n_bytes;

    (void)state;
    for (unsigned type = IMAGE_TYPE_MIN; type <= IMAGE_TYPE_MAX; type++) {
        memset(image, (int)type, IMAGE_BYTES_MAX);
        assert_int_equal(store_capture(writer, type, image, IMAGE_BYTES_MAX, &generation), 0);
        assert_int_equal(generation, 1);
    }
    for (unsigned type = IMAGE_TYPE_MIN; type <= IMAGE_TYPE_MAX; type++) {
        assert_int_equal(store_read(reader, type, out, &n_bytes, &generation), 0);
        assert_int_equal(n_bytes, IMAGE_BYTES_MAX);
        assert_int_equal(out[0], type);
        assert_memory_equal(out, out + 1, IMAGE_BYTES_MAX - 1);
    }
}

static void assert_range(size_t i, uint32_t offset, uint32_t n_bytes)
{
    assert_true(i < changes.n_ranges);
    assert_int_equal(changes.ranges[i].offset, offset);
    assert_int_equal(changes.ranges[i].n_bytes, n_bytes);
}

static void changes_are_whole_pages_in_ranges(void **state)
{
    (void)state;
    capture(image, 1000);
    assert_int_equal(store_collect(reader, TYPE, 0, &changes), 0);
    assert_int_equal(changes.n_ranges, 1);
    assert_range(0, 0, 1000);
    assert_int_equal(store_collect(reader, TYPE, 1, &changes), 0);
    assert_int_equal(changes.n_ranges, 0);

    image[64]++, image[128]++, image[999]++;
    capture(image, 1000);
    image[400]++;
    capture(image, 1000);
    assert_int_equal(store_collect(reader, TYPE, 1, &changes), 0);
    assert_int_equal(changes.n_ranges, 3);
    assert_range(0, 64, 128);
    assert_range(1, 384, 64);
    assert_range(2, 960, 40);
    assert_int_equal(changes.n_bytes, 128 + 64 + 40);
    assert_int_equal(changes.generation, 3);
    assert_int_equal(changes.image_bytes, 1000);
    assert_int_equal(store_collect(reader, TYPE, 2, &changes), 0);
    assert_int_equal(changes.n_ranges, 1);
}

static void most_ranges_fit(void **state)
{
    (void)state;
    capture(image, IMAGE_BYTES_MAX);
    for (size_t page = 0; page < IMAGE_PAGES_MAX; page += 2)
        image[page * PAGE_BYTES]++;
    capture(image, IMAGE_BYTES_MAX);
    assert_int_equal(store_collect(reader, TYPE, 1, &changes), 0);
    assert_int_equal(changes.n_ranges, STORE_RANGES_MAX);
    assert_range(STORE_RANGES_MAX - 1, IMAGE_BYTES_MAX - 2 * PAGE_BYTES, PAGE_BYTES);
}

static void a_new_length_is_a_change(void **state)
{
    (void)state;
    capture(image, 1000);
    assert_int_equal(capture(image, 960), 2);
    assert_int_equal(store_collect(reader, TYPE, 1, &changes), 0);
    assert_int_equal(changes.n_ranges, 0);
    assert_int_equal(changes.image_bytes, 960);
    assert_int_equal(capture(image, 1000), 3);
    assert_int_equal(store_collect(reader, TYPE, 2, &changes), 0);
    assert_int_equal(changes.n_ranges, 1);
    assert_range(0, 960, 40);
    assert_reads(image, 1000, 3);
}

static void growing_by_zeros_is_a_change_of_the_page(void **state)
{
    (void)state;
    memset(image, 0, sizeof(image));
    capture(image, 1000);
    assert_int_equal(capture(image, 1010), 2);
    assert_int_equal(store_collect(reader, TYPE, 1, &changes), 0);
    assert_int_equal(changes.n_ranges, 1);
    assert_range(0, 960, 50);
}

static void nothing_is_left_behind_the_end(void **state)
{
    (void)state;
    memset(image, 0xaa, sizeof(image));
    capture(image, 1000);
    capture(image, 10);
    assert_int_equal(raw[IMAGE_OFFSET + 9], 0xaa);
    for (size_t i = 10; i < 2000; i++)
        assert_int_equal(raw[IMAGE_OFFSET + i], 0);
}

static void memory_that_no_image_reached_is_not_touched(void **state)
{
    struct stat status;

    (void)state;
    capture(image, 10000);
    assert_reads(image, 10000, 1);
    store_collect(reader, TYPE, 0, &changes);
    assert_int_equal(fstat(store_fd(reader), &status), 0);
    /* The header, a page of generations, three of the image. */
    assert_int_equal(status.st_blocks * 512, 5 * 4096);
}

static void invariant_10_generations_are_above_the_floor(void **state)
{
    (void)state;
    assert_int_equal(capture(image, 100), 1);
    store_raise_generation(writer, TYPE, 17);
    assert_int_equal(capture(image, 100), 1);
    image[0]++;
    assert_int_equal(capture(image, 100), 18);
    store_raise_generation(writer, TYPE, 5);
    image[0]++;
    assert_int_equal(capture(image, 100), 19);
    assert_reads(image, 100, 19);
    assert_int_equal(store_collect(reader, TYPE, 18, &changes), 0);
    assert_int_equal(changes.n_ranges, 1);
}

static void the_next_generation_is_known_before_it_is_taken(void **state)
{
    uint64_t generation;

    (void)state;
    assert_int_equal(capture(image, 100), 1);
    assert_int_equal(store_next_generation(writer, TYPE, 0), 2);
    assert_int_equal(store_next_generation(writer, TYPE, 17), 18);
    assert_int_equal(store_take_generation(writer, TYPE, &generation), 0);
    assert_int_equal(generation, 2); /* to ask changes nothing */
    assert_int_equal(store_next_generation(writer, TYPE, 1), 3);
    assert_int_equal(store_next_generation(writer, TYPE, GENERATION_MAX), GENERATION_MAX + 1);
}

static void invariant_10_the_next_writer_goes_on(void **state)
{
    (void)state;
    capture(image, 100);
    store_free(writer);
    assert_int_equal(store_map(&writer, store_fd(reader), true), 0);
    assert_int_equal(capture(image, 100), 1);
    image[99]++;
    assert_int_equal(capture(image, 100), 2);
    assert_reads(image, 100, 2);
}

static void what_cannot_be_captured_changes_nothing(void **state)
{
    uint64_t generation;

    (void)state;
    static uint8_t large[IMAGE_BYTES_MAX + 1];
    capture(image, 100);
    assert_int_equal(store_capture(writer, TYPE, large, sizeof(large), &generation), -EMSGSIZE);
    store_raise_generation(writer, TYPE, GENERATION_MAX);
    assert_int_equal(capture(image, 100), 1);
    assert_int_equal(store_capture(writer, TYPE, large, 100, &generation), -EOVERFLOW);
    assert_reads(image, 100, 1);
}

static void put_control(size_t field, uint64_t value)
{
    memcpy(raw + CONTROL_OFFSET + 8 * field, &value, 8);
}

static uint64_t get_control(size_t field)
{
    uint64_t value;

    memcpy(&value, raw + CONTROL_OFFSET + 8 * field, 8);
    return value;
}

static void invariant_8_numbers_past_a_limit_are_refused(void **state)
{
    (void)state;
    capture(image, 100);
    for (size_t field = 1; field <= 2; field++) {
        uint64_t limit = field == 1 ? GENERATION_MAX : IMAGE_BYTES_MAX;
        uint64_t right = get_control(field);
        put_control(field, limit);
        assert_int_equal(read_result(), 0);
        put_control(field, limit + 1);
        assert_int_equal(read_result(), STORE_DAMAGED);
        assert_int_equal(store_collect(reader, TYPE, 0, &changes), STORE_DAMAGED);
        put_control(field, UINT64_MAX);
        assert_int_equal(read_result(), STORE_DAMAGED);
        struct store *next;
        assert_int_equal(store_map(&next, store_fd(reader), true), -EBADMSG);
        put_control(field, right);
        assert_int_equal(read_result(), 0);
    }
}

static void an_image_that_is_being_written_is_not_read(void **state)
{
    struct store *next;

    (void)state;
    capture(image, 100);
    put_control(0, get_control(0) + 1);
    assert_int_equal(read_result(), STORE_BUSY);
    assert_int_equal(store_collect(reader, TYPE, 0, &changes), STORE_BUSY);
    assert_int_equal(store_map(&next, store_fd(reader), true), -EBADMSG);
    put_control(0, get_control(0) + 1);
    assert_reads(image, 100, 1);
}

static void a_store_cannot_be_made_smaller_or_larger(void **state)
{
    (void)state;
    assert_int_equal(ftruncate(store_fd(reader), 4096), -1);
    assert_int_equal(errno, EPERM);
    assert_int_equal(ftruncate(store_fd(reader), LAYOUT_BYTES + 4096), -1);
    assert_int_equal(errno, EPERM);
}

static void store_that_is_not_shared_takes_images(void **state)
{
    uint8_t bytes[3] = {1, 2, 3}, out[IMAGE_BYTES_MAX];
    struct store *alone;
    uint64_t generation;
    size_t n_bytes;

    (void)state;
    assert_int_equal(store_new_alone(&alone), 0);
    assert_int_equal(store_fd(alone), -1);
    assert_int_equal(store_capture(alone, IMAGE_TYPE_MAX, bytes, sizeof(bytes), &generation), 0);
    assert_int_equal(store_read(alone, IMAGE_TYPE_MAX, out, &n_bytes, &generation), 0);
    assert_int_equal(n_bytes, sizeof(bytes));
    assert_memory_equal(out, bytes, sizeof(bytes));
    assert_int_equal(generation, 1);
    store_free(alone);
}

/* Map a copy of the store in which one byte of the header is another. */
static int map_altered(size_t altered, off_t n_bytes, int seals)
{
    uint8_t header[HEADER_BYTES];
    struct store *store;

    memcpy(header, raw, sizeof(header));
    if (altered < sizeof(header))
        header[altered] ^= 1;
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, n_bytes), 0);
    assert_int_equal(pwrite(fd, header, sizeof(header), 0), sizeof(header));
    assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
    int r = store_map(&store, fd, true);
    if (r == 0)
        store_free(store);
    close(fd);
    return r;
}

static void what_is_no_store_is_not_mapped(void **state)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW;
    struct store *store;

    (void)state;
    assert_int_equal(map_altered(HEADER_BYTES, LAYOUT_BYTES, seals), 0);
    for (size_t i = 0; i < HEADER_BYTES; i++)
        assert_int_equal(map_altered(i, LAYOUT_BYTES, seals), -EBADMSG);
    assert_int_equal(map_altered(HEADER_BYTES, LAYOUT_BYTES - 1, seals), -EBADMSG);
    assert_int_equal(map_altered(HEADER_BYTES, LAYOUT_BYTES + 1, seals), -EBADMSG);
    assert_int_equal(map_altered(HEADER_BYTES, LAYOUT_BYTES, F_SEAL_GROW), -EBADMSG);
    assert_int_equal(map_altered(HEADER_BYTES, LAYOUT_BYTES, F_SEAL_SHRINK), -EBADMSG);
    assert_int_equal(store_map(&store, -1, true), -EBADF);
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_int_equal(store_map(&store, fd, true), -EBADMSG);
    close(fd);
}

/* Memory whose second half faults when it is first used: there is time then to do something in the
 * middle of a copy. */
enum {
    TRAP_BYTES = 1 << 16,
};

static uint8_t *trap;
static void (*in_the_middle)(void);

static void on_fault(int signal_number, siginfo_t *fault, void *context)
{
    uint8_t *address = fault->si_addr;

    (void)signal_number, (void)context;
    if (!in_the_middle || address < trap + TRAP_BYTES / 2 || address >= trap + TRAP_BYTES)
        abort();
    mprotect(trap, TRAP_BYTES, PROT_READ | PROT_WRITE);
    void (*action)(void) = in_the_middle;
    in_the_middle = NULL;
    action();
}

static int set_up_trap(void **state)
{
    trap = mmap(NULL, IMAGE_BYTES_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(trap, MAP_FAILED);
    return set_up(state);
}

static int tear_down_trap(void **state)
{
    munmap(trap, IMAGE_BYTES_MAX);
    return tear_down(state);
}

static void set_trap(void (*action)(void))
{
    /* cmocka puts its own handler back after the test. */
    struct sigaction handler = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};

    in_the_middle = action;
    assert_int_equal(sigaction(SIGSEGV, &handler, NULL), 0);
    assert_int_equal(mprotect(trap + TRAP_BYTES / 2, TRAP_BYTES / 2, PROT_NONE), 0);
}

static void capture_twos(void)
{
    memset(image, 2, TRAP_BYTES);
    capture(image, TRAP_BYTES);
}

static void an_image_that_changes_while_it_is_read_is_read_again(void **state)
{
    uint64_t generation;
    size_t n_bytes;

    (void)state;
    memset(image, 1, TRAP_BYTES);
    capture(image, TRAP_BYTES);
    set_trap(capture_twos);
    assert_int_equal(store_read(reader, TYPE, trap, &n_bytes, &generation), 0);
    assert_null(in_the_middle);
    assert_int_equal(generation, 2);
    assert_int_equal(n_bytes, TRAP_BYTES);
    assert_memory_equal(trap, image, TRAP_BYTES);
}

static int result_in_the_middle;

static void read_in_the_middle(void)
{
    result_in_the_middle = read_result();
}

static void an_image_is_not_read_while_it_is_captured(void **state)
{
    (void)state;
    capture(image, TRAP_BYTES);
    memset(trap, 2, TRAP_BYTES);
    result_in_the_middle = 0;
    set_trap(read_in_the_middle);
    assert_int_equal(capture(trap, TRAP_BYTES), 2);
    assert_null(in_the_middle);
    assert_int_equal(result_in_the_middle, STORE_BUSY);
    assert_reads(trap, TRAP_BYTES, 2);
}

enum {
    CAPTURES = 3000,
    WRITTEN_BYTES_MIN = 5000,
    WRITTEN_BYTES_STEP = 997,
};

/* Each capture is of one byte value and a length that follows from its number, so that a reader
 * can tell from an image which one it has to be. */
static size_t written_bytes(uint64_t number)
{
    return WRITTEN_BYTES_MIN + number % 16 * WRITTEN_BYTES_STEP;
}

static void *write_many(void *unused)
{
    static uint8_t bytes[IMAGE_BYTES_MAX];
    uint64_t generation;

    (void)unused;
    for (uint64_t number = 1; number <= CAPTURES; number++) {
        memset(bytes, (int)(number % 251), written_bytes(number));
        if (store_capture(writer, TYPE, bytes, written_bytes(number), &generation) != 0 ||
            generation != number)
            return "the writer failed";
    }
    return NULL;
}

static void a_reader_never_sees_a_torn_image(void **state)
{
    uint64_t generation = 0, last = 0, reads = 0;
    size_t n_bytes;
    pthread_t thread;
    void *failure;

    (void)state;
    assert_int_equal(pthread_create(&thread, NULL, write_many, NULL), 0);
    while (generation < CAPTURES) {
        int r = store_read(reader, TYPE, out, &n_bytes, &generation);
        if (r == STORE_BUSY) /* as it may on a machine with much else to do */
            continue;
        assert_int_equal(r, 0);
        assert_true(generation >= last && generation <= CAPTURES);
        last = generation;
        if (generation == 0)
            continue;
        assert_int_equal(n_bytes, written_bytes(generation));
        assert_int_equal(out[0], generation % 251);
        assert_memory_equal(out, out + 1, n_bytes - 1);
        reads++;
    }
    assert_int_equal(pthread_join(thread, &failure), 0);
    assert_null(failure);
    assert_true(reads > 0);
}

#define store_test(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        store_test(an_image_is_read_as_it_was_captured),
        store_test(every_byte_of_a_page_counts),
        store_test(types_are_apart),
        store_test(changes_are_whole_pages_in_ranges),
        store_test(most_ranges_fit),
        store_test(a_new_length_is_a_change),
        store_test(growing_by_zeros_is_a_change_of_the_page),
        store_test(nothing_is_left_behind_the_end),
        store_test(memory_that_no_image_reached_is_not_touched),
        store_test(invariant_10_generations_are_above_the_floor),
        store_test(the_next_generation_is_known_before_it_is_taken),
        store_test(invariant_10_the_next_writer_goes_on),
        store_test(what_cannot_be_captured_changes_nothing),
        store_test(invariant_8_numbers_past_a_limit_are_refused),
        store_test(an_image_that_is_being_written_is_not_read),
        store_test(a_store_cannot_be_made_smaller_or_larger),
        store_test(store_that_is_not_shared_takes_images),
        store_test(what_is_no_store_is_not_mapped),
        cmocka_unit_test_setup_teardown(an_image_that_changes_while_it_is_read_is_read_again,
                                        set_up_trap, tear_down_trap),
        cmocka_unit_test_setup_teardown(an_image_is_not_read_while_it_is_captured, set_up_trap,
                                        tear_down_trap),
        store_test(a_reader_never_sees_a_torn_image),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
