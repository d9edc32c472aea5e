/* The sealed sandbox, in processes of its own: what is allowed works, and all else ends the
 * process.
 *
 * Under sanitizers the list is another one, as meson.build says. What is shipped is tried by
 * tests/system/test_sandbox.py.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "error.h"
#include "io.h"
#include "sandbox.h"
#include "thread.h"

enum {
    STACK_BYTES = 1 << 20,
    LARGE_BYTES = 8 << 20,
};

/* Run something in a child and return its wait status. */
static int in_child(void (*run)(void))
{
    int status;

    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        run();
        _exit(0); /* without what a sanitizer looks for at the end */
    }
    assert_true(child > 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static void must(int is_so)
{
    if (!is_so)
        _exit(1);
}

static void enter(void)
{
    must(sandbox_enter() == 0 && sandbox_seal() == 0);
}

static void *allocate(void *memory)
{
    void **out = memory;

    *out = malloc(LARGE_BYTES);
    return NULL;
}

static void work_in_a_thread(void)
{
    pthread_t thread;
    void *memory = NULL;

    must(thread_start(&thread, STACK_BYTES, allocate, &memory) == 0);
    enter();
    must(pthread_join(thread, NULL) == 0);
    must(memory != NULL);
    memory = realloc(memory, 2 * LARGE_BYTES);
    must(memory != NULL);
    memset(memory, 1, 2 * LARGE_BYTES);
    free(memory);
    error_report("a line");
}

static char directory[] = "/tmp/test_sandbox_XXXXXX";

static void write_a_file(void)
{
    struct io_posix io = {.io = io_posix_functions, .directory_fd = LINK_FD_DIRECTORY};
    static char text[] = "a";
    struct iovec vector = {text, 1};
    uint8_t byte;

    int fd = open(directory, O_RDONLY | O_DIRECTORY);
    must(dup2(fd, LINK_FD_DIRECTORY) >= 0);
    enter();
    fd = io.io.create(&io.io, "a");
    must(fd >= 0 && io.io.write(&io.io, fd, &vector, 1) == 0);
    io.io.set_direct(&io.io, fd);
    must(io.io.write_at(&io.io, fd, (const uint8_t *)"b", 1, 1) == 0);
    must(io.io.read_at(&io.io, fd, &byte, 1, 0) == -EBADF); /* it is open for writing alone */
    must(io.io.sync(&io.io, fd) == 0 && io.io.sync_data(&io.io, fd) == 0);
    io.io.close(&io.io, fd);
    must(io.io.rename(&io.io, "a", "b") == 0 && io.io.sync_directory(&io.io) == 0);
    must(io.io.unlink(&io.io, "b") == 0);
}

static void open_a_socket(void)
{
    enter();
    (void)socket(AF_INET, SOCK_STREAM, 0);
}

static void map_code(void)
{
    enter();
    (void)mmap(NULL, 1, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void read_a_file(void)
{
    enter();
    (void)open("/etc/passwd", O_RDONLY);
}

static void test_threads_that_run_go_on_and_allocate(void **state)
{
    (void)state;
    assert_int_equal(in_child(work_in_a_thread), 0);
}

static void test_files_are_written(void **state)
{
    (void)state;
    assert_non_null(mkdtemp(directory));
    int status = in_child(write_a_file);
    assert_int_equal(rmdir(directory), 0);
    assert_int_equal(status, 0);
}

static void test_all_else_kills(void **state)
{
    (void)state;
    assert_int_equal(in_child(open_a_socket), SIGSYS);
    assert_int_equal(in_child(map_code), SIGSYS);
    assert_int_equal(in_child(read_a_file), SIGSYS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads_that_run_go_on_and_allocate),
        cmocka_unit_test(test_files_are_written),
        cmocka_unit_test(test_all_else_kills),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
