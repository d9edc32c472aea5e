/*
 * What a TPM is reached by: the kernel's driver, or the registers of a TPM whose driver the kernel
 * was told not to start. So the last command before the guest sleeps can be another one than the
 * driver's TPM2_Shutdown. The registers are those of a FIFO interface (TIS, as of tpm-tis): TCG "PC
 * Client Platform TPM Profile", sections 6.5.2 and 6.5.3. Functions return -1 with a failure.
 */
#pragma once

#include "message.h"

/* Open a driver's device; or `/dev/mem`, where the TPM's registers are. Returns 0 or -1. */
int device_open(const char *path);

/* Send a command, whose code is for people, and wait for the response. Returns 0 or -1. */
int device_transact(uint32_t code, const struct message *command, struct message *response);
