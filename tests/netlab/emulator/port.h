/* A network interface of the emulator: frames in through a shared ring, out in batches. */
#ifndef PORT_H
#define PORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct arrival {
    uint8_t *frame; /* in the ring, until port_next is called again */
    size_t length;
    int64_t at; /* CLOCK_REALTIME, ns: when the kernel received it */
    bool oversize; /* longer than the MTU, or a run of segments not yet cut */
};

struct port {
    int fd;
    uint8_t *ring;
    size_t slot_bytes, slot_count, slot;
    size_t frame_max;
    bool held; /* the slot before `slot` is still ours */
    uint64_t overrun; /* frames the kernel dropped because the ring was full */
};

/* Opens the interface `name` of the present network namespace. Exits on failure. */
void port_open(struct port *port, const char *name, size_t mtu);

/* The next waiting frame, its checksum complete, or false. */
bool port_next(struct port *port, struct arrival *arrival);

/* Sends frames in order; returns how many of them the kernel refused. */
size_t port_send(struct port *port, uint8_t *const *frames, const uint16_t *lengths, size_t count);

void port_count_overrun(struct port *port);

#endif
