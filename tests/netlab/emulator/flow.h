/* Connections: TCP and UDP 4-tuples, what each may send, and what was seen of it. */
#ifndef FLOW_H
#define FLOW_H

#include "frame.h"

/* Limits of one way of a connection. */
struct limits {
    double rate;   /* bit/s, 0: none */
    double police; /* 1: drop above the rate; 0: queue */
    double queue;  /* bytes that may wait when shaped */
    double burst;  /* bytes of the token bucket when policed */
    double delay;  /* ns, below 0: the link's */
    double loss;   /* probability, below 0: the link's */
};

struct passage {
    struct limits limits;
    int64_t free_at;   /* shaped: when the last byte accepted has left */
    double tokens;     /* policed: bytes */
    int64_t filled_at; /* policed: when `tokens` was true */
    uint64_t packets, bytes, dropped;
    uint32_t isn, last_ack, seq_end;
    bool seen, acked, fin;
};

struct flow {
    struct key key;
    struct flow *next; /* of its hash chain; the newest of a 4-tuple comes first */
    uint32_t index;    /* order of first appearance */
    struct passage passage[2];
    uint8_t blackholed; /* bit per way */
    bool closed;        /* a reset was seen, or FIN both ways */
    bool resetting;     /* nothing passes any more; whatever an end sends is answered by a reset */
};

struct rule {
    uint16_t port;  /* of either end; 0: connections that no port rule takes. Rules of one port take turns */
    uint32_t taken; /* by the first rule of a port: connections given one of them */
    struct limits limits[2];
};

struct flows {
    struct flow **all, **buckets;
    uint32_t count, space, bucket_count;
    struct rule *rules;
    uint32_t rule_count;
};

/* The connection of a packet, made when it is new or a SYN starts the same 4-tuple again. */
struct flow *flow_of(struct flows *flows, const struct view *view, enum way way);

/* Notes sequence numbers and the end of a TCP connection. */
void flow_learn(struct flow *flow, const struct view *view, enum way way);

struct rule *flow_add_rule(struct flows *flows, uint16_t port);

#endif
