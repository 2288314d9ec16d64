#include "flow.h"

#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

static const struct limits unlimited = {.delay = -1, .loss = -1};

static void *grown(void *old, size_t bytes)
{
    void *new = realloc(old, bytes);
    if (!new)
        abort();
    return new;
}

static uint32_t hash(const struct key *key)
{
    uint64_t words[sizeof *key / 8], mixed = 0;
    _Static_assert(sizeof *key % 8 == 0, "the key is hashed in words");
    memcpy(words, key, sizeof words);
    for (size_t i = 0; i < sizeof words / 8; i++) {
        mixed = (mixed ^ words[i]) * 0x9e3779b97f4a7c15u;
        mixed ^= mixed >> 32;
    }
    return (uint32_t)mixed;
}

static void rehash(struct flows *flows)
{
    flows->bucket_count = flows->bucket_count ? flows->bucket_count * 4 : 1024;
    free(flows->buckets);
    flows->buckets = calloc(flows->bucket_count, sizeof *flows->buckets);
    if (!flows->buckets)
        abort();
    for (uint32_t i = 0; i < flows->count; i++) {
        struct flow *flow = flows->all[i], **bucket = &flows->buckets[hash(&flow->key) & (flows->bucket_count - 1)];
        flow->next = *bucket;
        *bucket = flow;
    }
}

static const struct rule *rule_for(struct flows *flows, const struct key *key)
{
    struct rule *rules = flows->rules, *first = NULL;
    uint32_t in_turn = 0;
    for (uint32_t i = 0; i < flows->rule_count; i++)
        if (rules[i].port && (rules[i].port == key->port[UP] || rules[i].port == key->port[DOWN])) {
            first = &rules[i];
            break;
        }
    for (uint32_t i = 0; i < flows->rule_count && !first; i++)
        if (!rules[i].port)
            first = &rules[i];
    if (!first)
        return NULL;
    for (uint32_t i = 0; i < flows->rule_count; i++)
        in_turn += rules[i].port == first->port;
    uint32_t skip = first->taken++ % in_turn;
    for (uint32_t i = 0;; i++)
        if (rules[i].port == first->port && skip-- == 0)
            return &rules[i];
}

static struct flow *add(struct flows *flows, const struct key *key)
{
    struct flow *flow = calloc(1, sizeof *flow);
    if (!flow)
        abort();
    if (flows->count == flows->space) {
        flows->space = flows->space ? flows->space * 2 : 256;
        flows->all = grown(flows->all, flows->space * sizeof *flows->all);
    }
    flow->key = *key;
    flow->index = flows->count;
    const struct rule *rule = rule_for(flows, key);
    for (int way = UP; way <= DOWN; way++) {
        flow->passage[way].limits = rule ? rule->limits[way] : unlimited;
        flow->passage[way].tokens = flow->passage[way].limits.burst;
    }
    flows->all[flows->count++] = flow;
    if (flows->count > flows->bucket_count) {
        rehash(flows);
    } else {
        struct flow **bucket = &flows->buckets[hash(key) & (flows->bucket_count - 1)];
        flow->next = *bucket;
        *bucket = flow;
    }
    return flow;
}

static bool starts_again(const struct flow *flow, const struct view *view, enum way way)
{
    if (view->protocol != IPPROTO_TCP)
        return false;
    struct tcp tcp = frame_tcp(view);
    return tcp.syn && !tcp.has_ack && flow->passage[way].seen && tcp.seq != flow->passage[way].isn;
}

struct flow *flow_of(struct flows *flows, const struct view *view, enum way way)
{
    struct key key = frame_key(view, way);
    struct flow *flow = flows->bucket_count ? flows->buckets[hash(&key) & (flows->bucket_count - 1)] : NULL;
    while (flow && memcmp(&flow->key, &key, sizeof key))
        flow = flow->next;
    return flow && !starts_again(flow, view, way) ? flow : add(flows, &key);
}

void flow_learn(struct flow *flow, const struct view *view, enum way way)
{
    struct passage *passage = &flow->passage[way];
    if (view->protocol != IPPROTO_TCP)
        return;
    struct tcp tcp = frame_tcp(view);
    if (!passage->seen)
        passage->isn = tcp.seq, passage->seq_end = tcp.seq_end;
    else if ((int32_t)(tcp.seq_end - passage->seq_end) > 0)
        passage->seq_end = tcp.seq_end;
    if (tcp.has_ack && (!passage->acked || (int32_t)(tcp.ack - passage->last_ack) > 0))
        passage->last_ack = tcp.ack, passage->acked = true;
    if (!tcp.rst)
        passage->seen = true;
    passage->fin |= tcp.fin;
    flow->closed |= tcp.rst || (flow->passage[UP].fin && flow->passage[DOWN].fin);
}

struct rule *flow_add_rule(struct flows *flows, uint16_t port)
{
    flows->rules = grown(flows->rules, (flows->rule_count + 1) * sizeof *flows->rules);
    struct rule *rule = &flows->rules[flows->rule_count++];
    *rule = (struct rule){.port = port, .limits = {unlimited, unlimited}};
    return rule;
}
