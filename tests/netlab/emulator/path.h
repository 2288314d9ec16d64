/* The link: every packet's way from one port to the other.

   1. A packet arrives; its connection is found. Faults first: reset, black hole.
   2. The connection's limit: policed (dropped above the rate) or shaped (queued, within a bound).
   3. The link's rate and its bounded queue, shared by all connections of that way.
   4. The wire: loss, corruption, duplication; then the delay, longer for a packet that is to be overtaken.
   5. Due packets leave in batches; how late they were is counted.

   Times are CLOCK_MONOTONIC ns. Steps 2 and 3 reckon with the kernel's time of arrival, not with the time at which
   this program ran, so that what it does late it does not do wrong, and all of its lateness is seen in step 5. */
#ifndef PATH_H
#define PATH_H

#include "flow.h"
#include "port.h"

/* One way of the link. Probabilities 0..1. */
struct wire {
    double delay, reorder_delay; /* ns */
    double loss, reorder, duplicate, corrupt;
    double rate;  /* bit/s, 0: none */
    double queue; /* bytes that may wait for the rate */
    int64_t free_at;
};

enum cause { LOST, QUEUE, CONNECTION_QUEUE, POLICED, BLACKHOLED, RESET, OVERSIZE, CAUSES };

struct counters {
    uint64_t packets_in, bytes_in, packets_out, bytes_out;
    uint64_t reordered, duplicated, corrupted, refused; /* refused: by the kernel, on sending */
    uint64_t dropped[CAUSES];
};

enum { LATENESS_STEP_NS = 20000, LATENESS_STEPS = 5000 };

struct lateness {
    uint64_t steps[LATENESS_STEPS]; /* the last one counts everything beyond */
    uint64_t count;
    int64_t max;
};

struct packet {
    struct packet *next; /* in the free list */
    struct flow *flow;   /* NULL: neither TCP nor UDP */
    uint64_t number;     /* of its connection and way, from 0: chance depends on it, not on time */
    uint16_t length;
    uint8_t way;
    bool shaped; /* left step 2; waits for step 3 */
    uint8_t frame[];
};

struct event {
    int64_t at;
    uint64_t serial; /* equal times: first in, first out */
    struct packet *packet;
};

struct path {
    struct wire wire[2];
    struct port port[2]; /* by way: where its packets arrive */
    struct flows flows;
    struct counters counters[2];
    struct lateness lateness;
    uint64_t seed, serial, others[2];
    uint8_t blackholed; /* bit per way, all connections */
    uint8_t mac[2][6];  /* by way: of the end that sends it */
    struct event *heap;
    size_t waiting, space;
    struct packet *unused;
    size_t held;
};

/* Takes in what arrived and lets out what is due. Returns whether anything moved. */
bool path_run(struct path *path);

/* When path_run has to be called next, though nothing arrives; INT64_MAX: never. */
int64_t path_next(const struct path *path);

/* Ends a TCP connection: both ends get a reset with the sequence number they expect. */
void path_reset(struct path *path, struct flow *flow);

/* Wakes the program less often when every packet is delayed by more than that anyway. ns. */
int64_t path_least_delay(const struct path *path);

int64_t now_ns(void);

#endif
