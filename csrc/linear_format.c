#include "linear_format.h"

#include <string.h>

#include "check.h"

static uint16_t get_le16(const uint8_t *bytes)
{
    return (uint16_t)(bytes[1] << 8 | bytes[0]);
}

static uint32_t get_le32(const uint8_t *bytes)
{
    return (uint32_t)get_le16(bytes + 2) << 16 | get_le16(bytes);
}

static uint64_t get_le64(const uint8_t *bytes)
{
    return (uint64_t)get_le32(bytes + 4) << 32 | get_le32(bytes);
}

static void put_le32(uint8_t *bytes, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint8_t)(value >> 8 * i);
}

static void put_le64(uint8_t *bytes, uint64_t value)
{
    put_le32(bytes, (uint32_t)value);
    put_le32(bytes + 4, (uint32_t)(value >> 32));
}

struct section {
    uint64_t begin, end;
};

static bool overlap(const struct section *a, const struct section *b)
{
    return a->begin < b->end && b->begin < a->end;
}

/* Returns false if it is none. */
static bool decode_slot(const uint8_t *slot, uint64_t file_bytes, struct linear_extent *data,
                        struct section *section)
{
    uint32_t offset = get_le32(slot), n_bytes = get_le32(slot + LINEAR_AT_DATA_BYTES);
    uint32_t section_bytes = get_le32(slot + LINEAR_AT_SECTION_BYTES);

    *section = (struct section){offset, (uint64_t)offset + section_bytes};
    *data = (struct linear_extent){offset, n_bytes};
    return offset >= LINEAR_HEADER_BYTES && section->end <= file_bytes && n_bytes > 0 &&
           n_bytes <= section_bytes && n_bytes <= LINEAR_DATA_BYTES_MAX;
}

enum linear_fault linear_decode(const uint8_t *bytes, size_t n_bytes, uint64_t file_bytes,
                                struct linear_header *header)
{
    struct section sections[LINEAR_STATES];

    *header = (struct linear_header){0};
    if (n_bytes < LINEAR_HEADER_BYTES || get_le64(bytes) != LINEAR_MAGIC)
        return LINEAR_FAULT_MAGIC;
    if (bytes[LINEAR_AT_VERSION] != LINEAR_VERSION ||
        get_le16(bytes + LINEAR_AT_HEADER_BYTES) != LINEAR_HEADER_BYTES)
        return LINEAR_FAULT_VERSION;
    for (size_t i = 0; i < LINEAR_SLOTS; i++) {
        const uint8_t *slot = bytes + LINEAR_AT_SLOTS + i * LINEAR_SLOT_BYTES;
        bool is_state = i < LINEAR_STATES;
        if (is_state)
            sections[i] = (struct section){0};
        if (get_le32(slot) == 0)
            continue;
        if (!is_state)
            return LINEAR_FAULT_SLOTS;
        if (!decode_slot(slot, file_bytes, &header->states[i], &sections[i]))
            return LINEAR_FAULT_SECTION;
        for (size_t other = 0; other < i; other++)
            if (overlap(&sections[i], &sections[other]))
                return LINEAR_FAULT_OVERLAP;
    }
    return LINEAR_NOTHING;
}

static uint64_t round_up(uint64_t value)
{
    return (value + LINEAR_UNIT_BYTES - 1) / LINEAR_UNIT_BYTES * LINEAR_UNIT_BYTES;
}

/* Where the section of a state ends: where the next begins, or at the end of its last unit. */
static uint64_t section_end(const struct linear_header *header, size_t state, uint64_t file_bytes)
{
    const struct linear_extent *ours = &header->states[state];
    uint64_t end = round_up((uint64_t)ours->offset + ours->n_bytes);

    if (end > file_bytes)
        end = file_bytes;
    for (size_t i = 0, is_last = true; i < LINEAR_STATES; i++) {
        const struct linear_extent *other = &header->states[i];
        if (other->n_bytes > 0 && other->offset > ours->offset &&
            (is_last || other->offset < end)) {
            end = other->offset;
            is_last = false;
        }
    }
    return end;
}

void linear_encode(const struct linear_header *header, uint64_t file_bytes,
                   uint8_t bytes[LINEAR_HEADER_BYTES])
{
    memset(bytes, 0, LINEAR_HEADER_BYTES);
    put_le64(bytes, LINEAR_MAGIC);
    bytes[LINEAR_AT_VERSION] = LINEAR_VERSION;
    bytes[LINEAR_AT_HEADER_BYTES] = LINEAR_HEADER_BYTES;
    for (size_t i = 0; i < LINEAR_STATES; i++) {
        const struct linear_extent *data = &header->states[i];
        uint8_t *slot = bytes + LINEAR_AT_SLOTS + i * LINEAR_SLOT_BYTES;
        if (data->n_bytes == 0)
            continue;
        uint64_t section_bytes = section_end(header, i, file_bytes) - data->offset;
        check(section_bytes >= data->n_bytes && section_bytes <= UINT32_MAX);
        put_le32(slot, data->offset);
        put_le32(slot + LINEAR_AT_DATA_BYTES, data->n_bytes);
        put_le32(slot + LINEAR_AT_SECTION_BYTES, (uint32_t)section_bytes);
    }
}

/* Go past what shares a unit with what would begin at `offset`. Returns false if nothing does. */
static bool go_past(const struct linear_extent *taken, uint32_t n_bytes, uint64_t *offset)
{
    uint64_t begin = taken->offset / LINEAR_UNIT_BYTES * LINEAR_UNIT_BYTES;
    uint64_t end = round_up((uint64_t)taken->offset + taken->n_bytes);
    struct section theirs = {begin, end}, ours = {*offset, round_up(*offset + n_bytes)};

    if (taken->n_bytes == 0 || !overlap(&theirs, &ours))
        return false;
    *offset = end;
    return true;
}

uint64_t linear_find_room(const struct linear_extent *taken, size_t n_taken, uint32_t n_bytes)
{
    uint64_t offset = LINEAR_UNIT_BYTES;

    for (bool is_free = false; !is_free;) {
        is_free = true;
        for (size_t i = 0; i < n_taken; i++)
            if (go_past(&taken[i], n_bytes, &offset))
                is_free = false;
    }
    return offset;
}
