#include "path.h"

#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BATCH = 64, PACKETS_MAX = 1 << 18 };
enum chance { LOSS = 1, CORRUPT, CORRUPT_WHERE, DUPLICATE, REORDER };

static int64_t clock_ns(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

int64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

/* splitmix64's finalizer over what identifies the decision: the same seed decides the same whatever the timing. */
static uint64_t random_of(const struct path *path, const struct packet *packet, enum chance chance)
{
    uint64_t flow = packet->flow ? packet->flow->index : UINT32_MAX;
    uint64_t parts[] = {flow << 8 | packet->way << 4 | chance, packet->number}, mixed = path->seed;
    for (int i = 0; i < 2; i++) {
        mixed = (mixed ^ parts[i]) + 0x9e3779b97f4a7c15u;
        mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
        mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
        mixed ^= mixed >> 31;
    }
    return mixed;
}

static bool happens(const struct path *path, const struct packet *packet, enum chance chance, double probability)
{
    return probability > 0 && (double)(random_of(path, packet, chance) >> 11) * 0x1p-53 < probability;
}

static struct packet *take(struct path *path)
{
    struct packet *packet = path->unused;
    if (packet) {
        path->unused = packet->next;
    } else if (path->held == PACKETS_MAX || !(packet = malloc(sizeof *packet + path->port[UP].frame_max))) {
        return NULL;
    }
    path->held++;
    return packet;
}

static void give_back(struct path *path, struct packet *packet)
{
    packet->next = path->unused;
    path->unused = packet;
    path->held--;
}

static void drop(struct path *path, struct packet *packet, enum cause cause)
{
    path->counters[packet->way].dropped[cause]++;
    if (packet->flow)
        packet->flow->passage[packet->way].dropped++;
    give_back(path, packet);
}

static bool earlier(const struct event *a, const struct event *b)
{
    return a->at != b->at ? a->at < b->at : a->serial < b->serial;
}

static void wait_until(struct path *path, struct packet *packet, int64_t at)
{
    if (path->waiting == path->space) {
        path->space = path->space ? path->space * 2 : 4096;
        path->heap = realloc(path->heap, path->space * sizeof *path->heap);
        if (!path->heap)
            abort();
    }
    struct event event = {at, path->serial++, packet};
    size_t hole = path->waiting++;
    for (; hole && earlier(&event, &path->heap[(hole - 1) / 2]); hole = (hole - 1) / 2)
        path->heap[hole] = path->heap[(hole - 1) / 2];
    path->heap[hole] = event;
}

static struct event pop(struct path *path)
{
    struct event first = path->heap[0], last = path->heap[--path->waiting];
    size_t hole = 0;
    for (size_t child = 1; child < path->waiting; child = 2 * hole + 1) {
        if (child + 1 < path->waiting && earlier(&path->heap[child + 1], &path->heap[child]))
            child++;
        if (!earlier(&path->heap[child], &last))
            break;
        path->heap[hole] = path->heap[child];
        hole = child;
    }
    path->heap[hole] = last;
    return first;
}

/* When `length` bytes have left a line of `rate`, or -1: no room in its queue. An idle line takes any packet. */
static int64_t leave(int64_t *free_at, double rate, double queue, size_t length, int64_t at)
{
    double ns_per_byte = 8e9 / rate;
    if (*free_at <= at)
        *free_at = at;
    else if ((double)(*free_at - at) / ns_per_byte + (double)length > queue)
        return -1;
    return *free_at += (int64_t)((double)length * ns_per_byte);
}

static bool police(struct passage *passage, size_t length, int64_t at)
{
    passage->tokens += (double)(at - passage->filled_at) * passage->limits.rate / 8e9;
    if (passage->tokens > passage->limits.burst)
        passage->tokens = passage->limits.burst;
    passage->filled_at = at;
    if (passage->tokens < (double)length)
        return false;
    passage->tokens -= (double)length;
    return true;
}

static void cross_wire(struct path *path, struct packet *packet, int64_t at)
{
    struct wire *wire = &path->wire[packet->way];
    struct counters *counters = &path->counters[packet->way];
    const struct limits *limits = packet->flow ? &packet->flow->passage[packet->way].limits : NULL;
    double delay = limits && limits->delay >= 0 ? limits->delay : wire->delay;
    if (happens(path, packet, LOSS, limits && limits->loss >= 0 ? limits->loss : wire->loss)) {
        drop(path, packet, LOST);
        return;
    }
    if (happens(path, packet, CORRUPT, wire->corrupt)) {
        struct view view;
        frame_parse(packet->frame, packet->length, &view);
        frame_corrupt(&view, packet->frame, packet->length, random_of(path, packet, CORRUPT_WHERE));
        counters->corrupted++;
    }
    if (happens(path, packet, REORDER, wire->reorder)) {
        delay += wire->reorder_delay;
        counters->reordered++;
    }
    bool twice = happens(path, packet, DUPLICATE, wire->duplicate);
    packet->shaped = false;
    wait_until(path, packet, at + (int64_t)delay);
    struct packet *copy = twice ? take(path) : NULL;
    if (copy) {
        memcpy(copy, packet, sizeof *packet + packet->length);
        counters->duplicated++;
        wait_until(path, copy, at + (int64_t)delay);
    }
}

static void enter_link(struct path *path, struct packet *packet, int64_t at)
{
    struct wire *wire = &path->wire[packet->way];
    if (wire->rate > 0 && (at = leave(&wire->free_at, wire->rate, wire->queue, packet->length, at)) < 0)
        drop(path, packet, QUEUE);
    else
        cross_wire(path, packet, at);
}

static void enter_connection(struct path *path, struct packet *packet, int64_t at)
{
    struct passage *passage = packet->flow ? &packet->flow->passage[packet->way] : NULL;
    if (!passage || passage->limits.rate <= 0) {
        enter_link(path, packet, at);
    } else if (passage->limits.police > 0) {
        if (police(passage, packet->length, at))
            enter_link(path, packet, at);
        else
            drop(path, packet, POLICED);
    } else {
        at = leave(&passage->free_at, passage->limits.rate, passage->limits.queue, packet->length, at);
        packet->shaped = true;
        if (at < 0)
            drop(path, packet, CONNECTION_QUEUE);
        else
            wait_until(path, packet, at);
    }
}

static void send_reset(struct path *path, struct flow *flow, enum way way)
{
    const struct passage *receiver = &flow->passage[!way];
    uint8_t frame[ETHERNET_HEADER + 60], *frames[] = {frame};
    if (!receiver->seen)
        return;
    uint16_t length =
        (uint16_t)frame_reset(frame, &flow->key, way, path->mac, receiver->last_ack, receiver->seq_end);
    port_send(&path->port[!way], frames, &length, 1);
}

void path_reset(struct path *path, struct flow *flow)
{
    flow->resetting = flow->closed = true;
    send_reset(path, flow, UP);
    send_reset(path, flow, DOWN);
}

/* Whatever an end still sends shows exactly which sequence number it expects next: nothing reaches it any more. */
static void answer_with_reset(struct path *path, struct packet *packet, const struct view *view)
{
    if (!frame_tcp(view).rst)
        send_reset(path, packet->flow, !packet->way);
    drop(path, packet, RESET);
}

static void receive(struct path *path, enum way way, const struct arrival *arrival, int64_t at)
{
    struct counters *counters = &path->counters[way];
    struct view view;
    struct packet *packet = arrival->oversize ? NULL : take(path);
    if (!packet) {
        counters->dropped[OVERSIZE] += arrival->oversize;
        counters->refused += !arrival->oversize;
        return;
    }
    packet->way = (uint8_t)way, packet->length = (uint16_t)arrival->length, packet->flow = NULL, packet->shaped = false;
    memcpy(packet->frame, arrival->frame, arrival->length);
    memcpy(path->mac[way], packet->frame + 6, 6);
    frame_parse(packet->frame, packet->length, &view);
    if (view.neighbour) {
        port_send(&path->port[!way], (uint8_t *[]){packet->frame}, &packet->length, 1);
        give_back(path, packet);
        return;
    }
    counters->packets_in++;
    counters->bytes_in += packet->length;
    struct flow *flow = view.l4 ? flow_of(&path->flows, &view, way) : NULL;
    packet->flow = flow;
    packet->number = flow ? flow->passage[way].packets++ : path->others[way]++;
    if (flow) {
        flow->passage[way].bytes += packet->length;
        flow_learn(flow, &view, way);
    }
    if (flow && flow->resetting)
        answer_with_reset(path, packet, &view);
    else if ((path->blackholed | (flow ? flow->blackholed : 0)) >> way & 1)
        drop(path, packet, BLACKHOLED);
    else
        enter_connection(path, packet, at);
}

static void count_lateness(struct lateness *lateness, int64_t late)
{
    int64_t step = late < 0 ? 0 : late / LATENESS_STEP_NS;
    lateness->steps[step < LATENESS_STEPS ? step : LATENESS_STEPS - 1]++;
    lateness->count++;
    if (late > lateness->max)
        lateness->max = late;
}

static void send_batch(struct path *path, enum way way, const struct event *events, size_t count)
{
    uint8_t *frames[BATCH];
    uint16_t lengths[BATCH];
    struct counters *counters = &path->counters[way];
    int64_t now = now_ns();
    for (size_t i = 0; i < count; i++) {
        frames[i] = events[i].packet->frame;
        lengths[i] = events[i].packet->length;
        counters->bytes_out += lengths[i];
        count_lateness(&path->lateness, now - events[i].at);
    }
    counters->packets_out += count;
    counters->refused += port_send(&path->port[!way], frames, lengths, count);
    for (size_t i = 0; i < count; i++)
        give_back(path, events[i].packet);
}

/* Lets out, in order of time, what is due at `until`. */
static bool release(struct path *path, int64_t until)
{
    struct event due[2][BATCH];
    size_t count[2] = {0, 0};
    bool moved = false;
    while (path->waiting && path->heap[0].at <= until) {
        struct event event = pop(path);
        struct packet *packet = event.packet;
        moved = true;
        if (packet->flow && packet->flow->resetting) {
            drop(path, packet, RESET);
        } else if (packet->shaped) {
            enter_link(path, packet, event.at);
        } else {
            due[packet->way][count[packet->way]++] = event;
            if (count[packet->way] == BATCH)
                send_batch(path, packet->way, due[packet->way], BATCH), count[packet->way] = 0;
        }
    }
    for (int way = UP; way <= DOWN; way++)
        if (count[way])
            send_batch(path, way, due[way], count[way]);
    return moved;
}

bool path_run(struct path *path)
{
    bool moved = false;
    int64_t now = now_ns(), to_monotonic = now - clock_ns(CLOCK_REALTIME);
    for (int way = UP; way <= DOWN; way++) {
        struct arrival arrival;
        for (int i = 0; i < 4 * BATCH && port_next(&path->port[way], &arrival); i++, moved = true) {
            int64_t at = arrival.at + to_monotonic;
            at = at > now + 1000000 ? now : at; /* the clock was set meanwhile */
            if (path->waiting && path->heap[0].at <= at && path->heap[0].packet->shaped)
                release(path, at);
            receive(path, way, &arrival, at);
        }
    }
    return release(path, now_ns()) | moved;
}

int64_t path_next(const struct path *path) { return path->waiting ? path->heap[0].at : INT64_MAX; }

int64_t path_least_delay(const struct path *path)
{
    double least = path->wire[UP].delay < path->wire[DOWN].delay ? path->wire[UP].delay : path->wire[DOWN].delay;
    for (uint32_t i = 0; i < path->flows.rule_count; i++)
        for (int way = UP; way <= DOWN; way++) {
            double delay = path->flows.rules[i].limits[way].delay;
            least = delay >= 0 && delay < least ? delay : least;
        }
    return (int64_t)least;
}
