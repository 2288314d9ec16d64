#define _GNU_SOURCE
#include "port.h"

#include "frame.h"

#include <arpa/inet.h>
#include <err.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

enum { RING_BYTES = 16 << 20, BLOCK_BYTES = 1 << 18, BATCH = 64 };

static void set(int fd, int option, int value)
{
    if (setsockopt(fd, SOL_PACKET, option, &value, sizeof value))
        err(1, "packet socket option %d", option);
}

void port_open(struct port *port, const char *name, size_t mtu)
{
    *port = (struct port){.frame_max = mtu + ETHERNET_HEADER, .slot_bytes = 2048};
    while (port->slot_bytes < port->frame_max + TPACKET2_HDRLEN + 64)
        port->slot_bytes *= 2;
    port->slot_count = RING_BYTES / port->slot_bytes;
    port->fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (port->fd < 0)
        err(1, "packet socket");
    set(port->fd, PACKET_VERSION, TPACKET_V2);
    set(port->fd, PACKET_VNET_HDR, 1);
    set(port->fd, PACKET_IGNORE_OUTGOING, 1);
    set(port->fd, PACKET_QDISC_BYPASS, 1);
    int send_bytes = 8 << 20;
    if (setsockopt(port->fd, SOL_SOCKET, SO_SNDBUFFORCE, &send_bytes, sizeof send_bytes))
        setsockopt(port->fd, SOL_SOCKET, SO_SNDBUF, &send_bytes, sizeof send_bytes);
    struct tpacket_req request = {
        .tp_block_size = BLOCK_BYTES,
        .tp_block_nr = RING_BYTES / BLOCK_BYTES,
        .tp_frame_size = (unsigned)port->slot_bytes,
        .tp_frame_nr = (unsigned)port->slot_count,
    };
    if (setsockopt(port->fd, SOL_PACKET, PACKET_RX_RING, &request, sizeof request))
        err(1, "receive ring");
    port->ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, port->fd, 0);
    if (port->ring == MAP_FAILED)
        err(1, "mapping the receive ring");
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(ETH_P_ALL),
        .sll_ifindex = (int)if_nametoindex(name),
    };
    if (!address.sll_ifindex || bind(port->fd, (struct sockaddr *)&address, sizeof address))
        err(1, "interface %s", name);
}

static struct tpacket2_hdr *header_of(const struct port *port, size_t slot)
{
    return (struct tpacket2_hdr *)(port->ring + slot * port->slot_bytes);
}

bool port_next(struct port *port, struct arrival *arrival)
{
    if (port->held) {
        size_t last = (port->slot ? port->slot : port->slot_count) - 1;
        __atomic_store_n(&header_of(port, last)->tp_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
        port->held = false;
    }
    struct tpacket2_hdr *header = header_of(port, port->slot);
    if (!(__atomic_load_n(&header->tp_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
        return false;
    port->held = true;
    port->slot = (port->slot + 1) % port->slot_count;
    struct virtio_net_hdr offload;
    arrival->frame = (uint8_t *)header + header->tp_mac;
    arrival->length = header->tp_snaplen;
    arrival->at = (int64_t)header->tp_sec * 1000000000 + header->tp_nsec;
    memcpy(&offload, arrival->frame - sizeof offload, sizeof offload);
    arrival->oversize = header->tp_len > port->frame_max || offload.gso_type != VIRTIO_NET_HDR_GSO_NONE;
    if (!arrival->oversize && offload.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)
        frame_finish_checksum(arrival->frame, arrival->length, offload.csum_start, offload.csum_offset);
    return true;
}

size_t port_send(struct port *port, uint8_t *const *frames, const uint16_t *lengths, size_t count)
{
    static struct virtio_net_hdr none;
    struct mmsghdr messages[BATCH];
    struct iovec parts[BATCH][2];
    size_t refused = 0;
    for (size_t from = 0; from < count; from += BATCH) {
        size_t size = count - from < BATCH ? count - from : BATCH;
        for (size_t i = 0; i < size; i++) {
            parts[i][0] = (struct iovec){&none, sizeof none};
            parts[i][1] = (struct iovec){frames[from + i], lengths[from + i]};
            messages[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = parts[i], .msg_iovlen = 2}};
        }
        for (size_t done = 0; done < size;) {
            int sent = sendmmsg(port->fd, messages + done, (unsigned)(size - done), MSG_DONTWAIT);
            if (sent <= 0)
                refused++, done++;
            else
                done += (size_t)sent;
        }
    }
    return refused;
}

void port_count_overrun(struct port *port)
{
    struct tpacket_stats stats;
    socklen_t size = sizeof stats;
    if (getsockopt(port->fd, SOL_PACKET, PACKET_STATISTICS, &stats, &size) == 0)
        port->overrun += stats.tp_drops;
}
