/* Ethernet frames: what the emulator reads of them, and the few bytes that it changes. */
#ifndef FRAME_H
#define FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ETHERNET_HEADER 14

/* Up is client to server. The port of a way is the one on which its frames arrive. */
enum way { UP, DOWN };

/* Pointers into a frame. `l4` is set for TCP and UDP with a whole header in this packet, NULL otherwise. */
struct view {
    uint8_t *ip, *l4;
    size_t l4_len;
    uint8_t family, protocol; /* 4 or 6, IPPROTO_*; family 0: not IP */
    bool neighbour;           /* ARP, IPv6 neighbour or multicast listener discovery */
};

/* Both ends of a connection. IPv4 addresses use the first 4 bytes, the rest is 0. Ports in host order. */
struct key {
    uint8_t address[2][16]; /* by way: the end that sends it */
    uint16_t port[2];
    uint8_t family, protocol;
    uint16_t zero;
};

struct tcp {
    uint32_t seq, ack, seq_end; /* seq_end counts SYN and FIN */
    bool syn, fin, rst, has_ack;
};

void frame_parse(uint8_t *frame, size_t length, struct view *view);
struct key frame_key(const struct view *view, enum way way);
struct tcp frame_tcp(const struct view *view);

/* Fills in a checksum left to the device: the field holds the pseudo header's sum. */
void frame_finish_checksum(uint8_t *frame, size_t length, size_t start, size_t offset);

/* Changes one byte after the IP header, never a checksum field, so that TCP and UDP checksums must fail. */
void frame_corrupt(const struct view *view, uint8_t *frame, size_t length, uint64_t random);

/* Writes the reset that an end of `key` accepts from the other: `way` is the way it travels. Returns its length. */
size_t frame_reset(uint8_t *frame, const struct key *key, enum way way, const uint8_t mac[2][6], uint32_t seq, uint32_t ack);

#endif
