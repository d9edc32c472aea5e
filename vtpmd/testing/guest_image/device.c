#include "device.h"

#include "failure.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const off_t registers_address = 0xfed40000; /* of locality 0 */

enum {
    REGISTERS_BYTES = 0x1000,
    REGISTER_ACCESS = 0x00,
    REGISTER_STATUS = 0x18,
    REGISTER_DATA = 0x24,
    ACCESS_REQUEST = 0x02,
    ACCESS_ACTIVE = 0x20,
    STATUS_DATA = 0x10,
    STATUS_GO = 0x20,
    STATUS_READY = 0x40,
    POLL_US = 1000,
    POLLS_MAX = 60000, /* longer than any command takes */
};

static const char memory[] = "/dev/mem";

static int device = -1;
static volatile uint8_t *registers; /* NULL: the device is a driver's */

int device_open(const char *path)
{
    device = open(path, O_RDWR | O_CLOEXEC);
    if (device < 0)
        return failure("cannot open %s: %s", path, strerror(errno));
    if (strcmp(path, memory) != 0)
        return 0;
    void *mapped =
        mmap(NULL, REGISTERS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, device, registers_address);
    if (mapped == MAP_FAILED)
        return failure("cannot map the TPM's registers: %s", strerror(errno));
    registers = mapped;
    return 0;
}

static int wait_for(size_t number, uint8_t bit)
{
    for (int poll = 0; poll < POLLS_MAX; poll++) {
        if (registers[number] & bit)
            return 0;
        usleep(POLL_US);
    }
    return failure("the TPM's register %#zx stays at %#x", number, registers[number]);
}

static int transact_by_registers(const struct message *command, struct message *response)
{
    registers[REGISTER_ACCESS] = ACCESS_REQUEST; /* again: a reset takes it away */
    if (wait_for(REGISTER_ACCESS, ACCESS_ACTIVE) < 0)
        return -1;
    registers[REGISTER_STATUS] = STATUS_READY;
    if (wait_for(REGISTER_STATUS, STATUS_READY) < 0)
        return -1;
    for (size_t i = 0; i < command->size; i++)
        registers[REGISTER_DATA] = command->data[i];
    registers[REGISTER_STATUS] = STATUS_GO;
    if (wait_for(REGISTER_STATUS, STATUS_DATA) < 0)
        return -1;
    *response = (struct message){0};
    while (registers[REGISTER_STATUS] & STATUS_DATA)
        put_u8(response, registers[REGISTER_DATA]);
    registers[REGISTER_STATUS] = STATUS_READY;
    return response->broken ? failure("the response has no end") : 0;
}

static int transact_by_driver(uint32_t code, const struct message *command,
                              struct message *response)
{
    ssize_t size = write(device, command->data, command->size);

    if (size != (ssize_t)command->size)
        return failure("command %#x: write to the TPM device: %s", code, strerror(errno));
    size = read(device, response->data, sizeof(response->data));
    if (size < 0)
        return failure("command %#x: read from the TPM device: %s", code, strerror(errno));
    response->size = (size_t)size;
    response->offset = 0;
    response->broken = false;
    return 0;
}

int device_transact(uint32_t code, const struct message *command, struct message *response)
{
    return registers ? transact_by_registers(command, response)
                     : transact_by_driver(code, command, response);
}
