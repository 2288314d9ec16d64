#include "frame.h"

#include <arpa/inet.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <string.h>

enum { FIN = 1, SYN = 2, RST = 4, ACK = 16 };

static uint16_t read16(const uint8_t *at) { return (uint16_t)(at[0] << 8 | at[1]); }
static uint32_t read32(const uint8_t *at) { return (uint32_t)read16(at) << 16 | read16(at + 2); }
static void write16(uint8_t *at, uint32_t value) { at[0] = (uint8_t)(value >> 8), at[1] = (uint8_t)value; }
static void write32(uint8_t *at, uint32_t value) { write16(at, value >> 16), write16(at + 2, value); }

/* RFC 1071, in the machine's byte order. */
static uint64_t sum(const uint8_t *data, size_t length, uint64_t total)
{
    for (; length >= 4; data += 4, length -= 4) {
        uint32_t word;
        memcpy(&word, data, 4);
        total += word;
    }
    if (length >= 2) {
        uint16_t word;
        memcpy(&word, data, 2);
        total += word, data += 2, length -= 2;
    }
    if (length) {
        uint16_t word = 0;
        memcpy(&word, data, 1);
        total += word;
    }
    return total;
}

static uint16_t fold(uint64_t total)
{
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return (uint16_t)~total;
}

static void parse_ipv4(struct view *view, size_t length)
{
    size_t header = (size_t)(view->ip[0] & 15) * 4, total = read16(view->ip + 2);
    if (header < 20 || total < header || total > length)
        return;
    view->family = 4;
    view->protocol = view->ip[9];
    if ((read16(view->ip + 6) & 0x1fff) == 0)
        view->l4 = view->ip + header, view->l4_len = total - header;
}

static void parse_ipv6(struct view *view, size_t length)
{
    size_t total = 40 + (size_t)read16(view->ip + 4), at = 40;
    if (total > length)
        return;
    view->family = 6;
    view->protocol = view->ip[6];
    while (view->protocol == IPPROTO_HOPOPTS || view->protocol == IPPROTO_ROUTING || view->protocol == IPPROTO_DSTOPTS ||
           view->protocol == IPPROTO_FRAGMENT) {
        if (at + 8 > total)
            return;
        bool fragment = view->protocol == IPPROTO_FRAGMENT;
        view->protocol = view->ip[at];
        if (fragment && read16(view->ip + at + 2) & 0xfff8)
            return;
        at += fragment ? 8 : 8 + (size_t)view->ip[at + 1] * 8;
    }
    if (at > total)
        return;
    uint8_t type = at < total ? view->ip[at] : 0;
    view->neighbour = view->protocol == IPPROTO_ICMPV6 && ((type >= 130 && type <= 137) || type == 143);
    view->l4 = view->ip + at, view->l4_len = total - at;
}

void frame_parse(uint8_t *frame, size_t length, struct view *view)
{
    *view = (struct view){.ip = frame + ETHERNET_HEADER};
    if (length < ETHERNET_HEADER)
        return;
    uint16_t type = read16(frame + 12);
    view->neighbour = type == ETHERTYPE_ARP;
    if (type == ETHERTYPE_IP && length >= ETHERNET_HEADER + 20)
        parse_ipv4(view, length - ETHERNET_HEADER);
    else if (type == ETHERTYPE_IPV6 && length >= ETHERNET_HEADER + 40)
        parse_ipv6(view, length - ETHERNET_HEADER);
    size_t least = view->protocol == IPPROTO_TCP ? 20 : view->protocol == IPPROTO_UDP ? 8 : SIZE_MAX;
    if (view->l4_len < least)
        view->l4 = NULL;
}

struct key frame_key(const struct view *view, enum way way)
{
    struct key key = {.family = view->family, .protocol = view->protocol};
    size_t size = view->family == 4 ? 4 : 16, at = view->family == 4 ? 12 : 8;
    memcpy(key.address[way], view->ip + at, size);
    memcpy(key.address[!way], view->ip + at + size, size);
    key.port[way] = read16(view->l4);
    key.port[!way] = read16(view->l4 + 2);
    return key;
}

struct tcp frame_tcp(const struct view *view)
{
    const uint8_t *at = view->l4;
    uint8_t flags = at[13];
    size_t header = (size_t)(at[12] >> 4) * 4;
    struct tcp tcp = {.seq = read32(at + 4), .ack = read32(at + 8)};
    tcp.syn = flags & SYN, tcp.fin = flags & FIN, tcp.rst = flags & RST, tcp.has_ack = flags & ACK;
    tcp.seq_end = tcp.seq + (uint32_t)(view->l4_len > header ? view->l4_len - header : 0) + tcp.syn + tcp.fin;
    return tcp;
}

void frame_finish_checksum(uint8_t *frame, size_t length, size_t start, size_t offset)
{
    if (start + offset + 2 > length)
        return;
    uint16_t value = fold(sum(frame + start, length - start, 0));
    if (value == 0) /* RFC 768: 0 means none; for TCP both are zero in one's complement */
        value = 0xffff;
    memcpy(frame + start + offset, &value, 2);
}

void frame_corrupt(const struct view *view, uint8_t *frame, size_t length, uint64_t random)
{
    uint8_t *at = view->l4 ? view->l4 : frame + ETHERNET_HEADER;
    size_t span = view->l4 ? view->l4_len : length - ETHERNET_HEADER;
    if (span == 0)
        return;
    size_t index = (random >> 8) % span, field = view->protocol == IPPROTO_TCP ? 16 : 6;
    if (view->l4 && (index == field || index == field + 1))
        index = 0;
    at[index] ^= (uint8_t)(1 + random % 255);
}

size_t frame_reset(uint8_t *frame, const struct key *key, enum way way, const uint8_t mac[2][6], uint32_t seq, uint32_t ack)
{
    bool v4 = key->family == 4;
    size_t header = v4 ? 20 : 40, size = v4 ? 4 : 16, length = ETHERNET_HEADER + header + 20;
    uint8_t *ip = frame + ETHERNET_HEADER, *tcp = ip + header, *from = ip + (v4 ? 12 : 8);
    memset(frame, 0, length);
    memcpy(frame, mac[!way], 6);
    memcpy(frame + 6, mac[way], 6);
    write16(frame + 12, v4 ? ETHERTYPE_IP : ETHERTYPE_IPV6);
    memcpy(from, key->address[way], size);
    memcpy(from + size, key->address[!way], size);
    if (v4) {
        ip[0] = 0x45, ip[8] = 64, ip[9] = IPPROTO_TCP;
        write16(ip + 2, 40);
        uint16_t value = fold(sum(ip, 20, 0));
        memcpy(ip + 10, &value, 2);
    } else {
        ip[0] = 0x60, ip[6] = IPPROTO_TCP, ip[7] = 64;
        write16(ip + 4, 20);
    }
    write16(tcp, key->port[way]);
    write16(tcp + 2, key->port[!way]);
    write32(tcp + 4, seq);
    write32(tcp + 8, ack);
    tcp[12] = 5 << 4, tcp[13] = RST | ACK;
    uint16_t value = fold(sum(tcp, 20, sum(from, 2 * size, (uint64_t)htons(IPPROTO_TCP) + htons(20))));
    memcpy(tcp + 16, &value, 2);
    return length;
}
