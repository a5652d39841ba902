/* One server with an owner, one hot standby and the directory's row: two nodes, which change their
 * parts as often as epochs allow. No clocks: whoever suspects may do so at any moment, and any node
 * may be paused between any two steps. Links deliver in order, however late; what is lost counts as
 * very late. One node may lose its memory, once.
 *
 * README.md beside this file says which code each step stands for.
 *
 *   -DNO_FENCE       a standby that asks for promotion goes on acknowledging     (must fail)
 *   -DFENCE_LATE     it stops acknowledging after the swap instead of before     (must fail)
 *   -DASYNC          replies do not wait for the standby                         (must fail)
 *   -DSOLO_NO_CAS    an owner whose standby is silent goes on without a swap     (must fail)
 *   -DJOIN_OPEN      an owner that asked for a standby releases until it is told (must fail)
 *   -DJOIN_SOON      it asks as soon as the whole cut is there, though it has released more since
 *                                                                                (must fail)
 *   -DNO_EPOCH       what counts is how many standbys there were at the execution, not at the
 *                    release                                                     (must fail)
 *   -DOLD_WORD       a standby's word counts whatever epoch it is for            (must fail)
 *   -DEMPTY          who lost its memory may be promoted                         (must fail)
 *   -DNO_REWIND      who joins again keeps what it had                           (must fail)
 *   -DREAD_LOCAL     a read asks nobody                                          (must fail)
 *   -DREAD_EARLY     a read takes the standby's word for an earlier one          (must fail)
 *   -DSTEP_LATE      a request of a handler leaves before the standby has its record (must fail)
 *   -DNO_REPLAY      a failover does not repeat the recorded request             (must fail)
 */
#ifndef EPOCHS
#define EPOCHS 6            /* the last one: five changes of the row */
#endif
#ifndef READS
#define READS 2
#endif
#ifndef STREAMS
#define STREAMS 4           /* whole cuts that begin a new stream */
#endif
#ifndef SLOTS
#define SLOTS 2             /* messages on the way, each way */
#endif
#define N 3                 /* requests of one client, each repeated until it is answered */
#define OUTGOING 1          /* the handler of this one makes a request of its own */
#define NOBODY 2

/* the row */
byte epoch = 1; byte owner = 0; byte standby = 1;

/* parts that a node may have */
#define NONE 0
#define OWNER 1
#define STANDBY 2           /* has a whole cut */
#define PROMOTING 3         /* the same, and suspects the owner */
/* what an owner has asked the directory for and knows no outcome of */
#define LEAVE 1             /* to be without the standby */
#define JOIN 2              /* to have it */
#define GATE 3              /* nothing yet: it has a whole cut, and what it lacks is on its way */

/* State: the results of the requests executed so far, each 1 or 2 (which node it was executed at,
 * so that an execution anew is seen), as digits to the base 3. */
typedef Copy {
  byte part; byte epoch; byte stream; byte done; byte state; byte step;      /* step: what the handler sent */
  /* owner */
  bit alone; bit joining; byte asked; byte gate; byte taken; bit stepped; bit sent; bit free;
  /* standby */
  byte least                                                    /* lowest epoch it takes */
};
Copy c[2];

/* what the world was told: results, and how many requests it knows to be done; the request that
 * was sent on */
byte told[N]; byte known = 0; byte out = 0;

/* the read under way */
bit reading = 0; byte reads = 0; byte at_node; byte known_then; byte seen; byte seen_state;

bit forgot = 0; byte streams = 1; byte forgot_at = 0;

mtype = { WHOLE, CUT, STEP, PING, TAKEN, STEPPED, PONG, REFUSED };
/* to a node from its owner: kind, stream, epoch, two values; from its standby: kind, stream, value */
chan down0 = [SLOTS] of { mtype, byte, byte, byte, byte };
chan down1 = [SLOTS] of { mtype, byte, byte, byte, byte };
chan up0 = [SLOTS] of { mtype, byte, byte };
chan up1 = [SLOTS] of { mtype, byte, byte };

#define POWER(r) ((r) == 0 -> 1 : ((r) == 1 -> 3 : 9))
#define RESULT(state, r) (((state) / POWER(r)) % 3)
#define AGREES(n, r) (told[r] == 0 || (c[n].done > r && RESULT(c[n].state, r) == told[r]))
#define HAS(n) (AGREES(n, 0) && AGREES(n, 1) && AGREES(n, 2))

/* Deltas of a joining standby are of the epoch at which it will be one. */
#define STREAM (c[me].epoch + c[me].joining)
#define FOLLOWED (!c[me].alone || c[me].joining)
#define BUSY (c[me].done == OUTGOING && c[me].step != 0)

/* A standby takes a delta; one that asks for promotion only if it is not fenced, which it is. */
#define TAKES ((c[me].part == STANDBY || c[me].part == PROMOTING) && \
               w == c[me].stream && e >= c[me].least)

#ifdef JOIN_OPEN
#define ON_ITS_OWN (c[me].alone && c[me].asked != GATE)
#else
#define ON_ITS_OWN (c[me].alone && c[me].asked != JOIN && c[me].asked != GATE)
#endif

#ifdef ASYNC
#define RELEASES(number) true
#else
#ifdef NO_EPOCH
#define RELEASES(number) (ON_ITS_OWN || c[me].taken > (number) || c[me].free)
#else
#define RELEASES(number) (ON_ITS_OWN || c[me].taken > (number))
#endif
#endif

#ifdef OLD_WORD
#define OF_THIS_STREAM true
#else
#define OF_THIS_STREAM (w == c[me].stream)
#endif

inline down(kind, a1, b1) {
  if
  :: me == 0 -> down1!kind,c[me].stream,STREAM,a1,b1
  :: me == 1 -> down0!kind,c[me].stream,STREAM,a1,b1
  fi
}
#define ROOM ((me == 0 && nfull(down1)) || (me == 1 && nfull(down0)))

inline up(kind, a1) {
  if
  :: me == 0 && nfull(up1) -> up1!kind,w,a1
  :: me == 1 && nfull(up0) -> up0!kind,w,a1
  :: me == 0 && full(up1) -> skip      /* the link broke */
  :: me == 1 && full(up0) -> skip
  fi
}

inline go_alone() {
  c[me].alone = 1; c[me].joining = 0; c[me].asked = 0; c[me].gate = 0;
  c[me].taken = 0; c[me].stepped = 0
}

inline deposed() {
  c[me].part = NONE; c[me].epoch = 0; c[me].stream = 0; go_alone(); c[me].alone = 0; c[me].sent = 0; c[me].free = 0;
  c[me].step = 0;
#ifndef NO_REWIND
  c[me].done = 0; c[me].state = 0;
#endif
  if :: reading && at_node == me -> reading = 0; seen = 0; seen_state = 0; known_then = 0 :: else fi
}

/* Somebody is told of the results of the first requests. */
inline tell(upto, results) {
  i = 0;
  do
  :: i < upto ->
       assert(told[i] == 0 || told[i] == RESULT(results, i));   /* nothing runs twice */
       told[i] = RESULT(results, i); i++
  :: else -> break
  od;
  i = 0;
  if :: known < upto -> known = upto :: else fi;
  /* whoever owns has it, and so has whoever can be promoted */
  assert(c[owner].part != OWNER || HAS(owner));
  assert(owner == me || HAS(owner));
  assert(standby == NOBODY || c[standby].part < STANDBY || HAS(standby));
  assert(out == 0 || told[OUTGOING] == 0 || told[OUTGOING] == out)
}

inline promoted() {
  c[me].part = OWNER; c[me].epoch = c[me].epoch + 1; c[me].least = c[me].epoch;
  c[me].sent = 0; c[me].free = 0; c[me].stream = 0; go_alone();
#ifdef NO_REPLAY
  c[me].step = 0;
#endif
  assert(HAS(me))
}

proctype Node(byte me) {
  byte other = 1 - me; byte w, e, a, b, i; mtype kind;
end:
  do
  /* ---- owner: executes what the client asks for next, or asks for again */
  :: atomic { c[me].part == OWNER && c[me].done < N && c[me].done <= known &&
       c[me].done != OUTGOING && (ROOM || !FOLLOWED) ->
       c[me].state = c[me].state + POWER(c[me].done) * (me + 1); c[me].done++;
       c[me].free = c[me].alone;
       if :: FOLLOWED -> down(CUT, c[me].done, me + 1) :: else fi }
  /* ---- and this one makes a request of its own: its record first */
  :: atomic { c[me].part == OWNER && c[me].done == OUTGOING && known >= OUTGOING &&
       c[me].step == 0 && (ROOM || !FOLLOWED) ->
       c[me].step = me + 1; c[me].stepped = 0;
       if :: FOLLOWED -> down(STEP, 0, c[me].step) :: else fi }
  :: atomic { c[me].part == OWNER && BUSY && !c[me].sent &&
#ifndef STEP_LATE
       (ON_ITS_OWN || c[me].stepped) &&
#endif
       true ->
       assert(out == 0 || out == c[me].step);       /* the receiver knows this number: the same */
       out = c[me].step; c[me].sent = 1 }
  :: atomic { c[me].part == OWNER && BUSY && c[me].sent && (ROOM || !FOLLOWED) ->
       c[me].state = c[me].state + POWER(OUTGOING) * c[me].step; c[me].done++;
       c[me].free = c[me].alone; b = c[me].step; c[me].step = 0; c[me].sent = 0;
       if :: FOLLOWED -> down(CUT, c[me].done, b) :: else fi; b = 0 }
  /* ---- and answers */
  :: atomic { c[me].part == OWNER && c[me].done > known && RELEASES(known + 1) ->
       tell(known + 1, c[me].state) }

  /* ---- a read: what is there, then a word of the standby, asked for after the read came */
  :: atomic { c[me].part == OWNER && !reading && reads < READS && (ROOM || !FOLLOWED) ->
       reading = 1; reads++; at_node = me; known_then = known; seen = c[me].done;
       seen_state = c[me].state;
       if
       :: FOLLOWED -> down(PING, reads, 0)
       :: !FOLLOWED -> skip
       fi }
  :: atomic { reading && at_node == me && c[me].part == OWNER &&
#ifdef READ_LOCAL
       true ->
#else
       ON_ITS_OWN ->
#endif
       assert(seen >= known_then); tell(seen, seen_state);
       reading = 0; seen = 0; seen_state = 0; known_then = 0 }
  :: atomic { reading && at_node == me ->           /* who asked is gone */
       reading = 0; seen = 0; seen_state = 0; known_then = 0 }

  /* ---- the standby is silent: on its own, by a swap */
#ifdef SOLO_NO_CAS
  :: atomic { c[me].part == OWNER && !c[me].alone && !c[me].asked -> go_alone() }
#else
  :: atomic { c[me].part == OWNER && !c[me].alone && !c[me].asked && c[me].epoch < EPOCHS ->
       c[me].asked = LEAVE }
#endif
  :: atomic { c[me].part == OWNER && c[me].asked == LEAVE &&
       epoch == c[me].epoch && owner == me && standby == other ->
       epoch++; standby = NOBODY }                  /* takes effect; not known yet */
  :: atomic { c[me].part == OWNER && c[me].asked == LEAVE && epoch != c[me].epoch ->
       if
       :: epoch == c[me].epoch + 1 && owner == me -> c[me].epoch++; go_alone()
       :: else -> deposed()
       fi }

  /* ---- a new standby: a whole cut, at a quiescent point; what follows; then the swap */
  :: atomic { c[me].part == OWNER && c[me].alone && !c[me].joining && !c[me].asked && !BUSY &&
       c[me].epoch < EPOCHS && streams < STREAMS && ROOM ->
       streams++; c[me].stream = streams; c[me].joining = 1; c[me].taken = 0; c[me].stepped = 0;
       down(WHOLE, c[me].done, c[me].state) }
  :: atomic { c[me].part == OWNER && c[me].joining && c[me].asked != JOIN ->
       c[me].joining = 0; c[me].asked = 0; c[me].gate = 0; c[me].taken = 0; c[me].stepped = 0 }  /* given up */
  /* from a cut on what is released waits for it, and it has to have that cut before the swap: it
   * may suspect at once, and then takes nothing more */
#ifdef JOIN_SOON
  :: atomic { c[me].part == OWNER && c[me].joining && !c[me].asked && c[me].taken > 0 ->
       c[me].asked = JOIN }
#else
  :: atomic { c[me].part == OWNER && c[me].joining && !c[me].asked && c[me].taken > 0 && !BUSY ->
       c[me].asked = GATE; c[me].gate = c[me].done }
  :: atomic { c[me].part == OWNER && c[me].asked == GATE && c[me].taken > c[me].gate ->
       c[me].asked = JOIN; c[me].gate = 0 }
#endif
  :: atomic { c[me].part == OWNER && c[me].asked == JOIN &&
       epoch == c[me].epoch && owner == me && standby == NOBODY ->
       epoch++; standby = other;                    /* takes effect; not known yet */
       /* the row names nobody who lacks anything, unless it forgot after it had said so */
       assert(forgot_at == c[me].stream || (c[other].part >= STANDBY && HAS(other))) }
  :: atomic { c[me].part == OWNER && c[me].asked == JOIN && epoch != c[me].epoch ->
       if
       :: epoch == c[me].epoch + 1 && owner == me ->
            c[me].epoch++; c[me].alone = 0; c[me].joining = 0; c[me].asked = 0
       :: else -> deposed()
       fi }

  /* ---- standby: suspects the owner, at any moment; fences first, then swaps */
  :: atomic { c[me].part == STANDBY && c[me].epoch < EPOCHS ->
       c[me].part = PROMOTING;
#ifndef FENCE_LATE
#ifndef NO_FENCE
       c[me].least = c[me].epoch + 1
#endif
#endif
     }
  :: atomic { c[me].part == PROMOTING && epoch == c[me].epoch && owner == other &&
       standby == me ->
       epoch++; owner = me; standby = NOBODY }      /* takes effect; not known yet */
  :: atomic { c[me].part == PROMOTING && epoch != c[me].epoch ->
       if
       :: epoch == c[me].epoch + 1 && owner == me -> promoted()
       :: epoch < c[me].epoch -> skip               /* named it is not yet */
       :: else -> deposed()
       fi }
#ifdef EMPTY
  :: atomic { c[me].part == NONE && standby == me && owner == other && epoch < EPOCHS ->
       epoch++; owner = me; standby = NOBODY; c[me].epoch = epoch - 1; promoted() }
#endif

  /* ---- what comes to a standby */
  :: atomic { ((me == 0 && nempty(down0)) || (me == 1 && nempty(down1))) ->
       if :: me == 0 -> down0?kind,w,e,a,b :: me == 1 -> down1?kind,w,e,a,b fi;
       if
       :: kind == WHOLE && e >= c[me].least && c[me].part != PROMOTING &&
          (e > c[me].epoch || c[me].part == STANDBY) ->
            if :: c[me].part == OWNER -> deposed() :: else fi;  /* another one owns by now */
            c[me].part = STANDBY; c[me].epoch = e; c[me].least = e; c[me].stream = w; c[me].step = 0;
#ifdef NO_REWIND
            if
            :: c[me].done < a -> c[me].done = a; c[me].state = b
            :: else
            fi;
#else
            c[me].done = a; c[me].state = b;
#endif
            up(TAKEN, a + 1)
       :: kind == CUT && TAKES ->
            if
            :: c[me].part == PROMOTING -> skip      /* too late for what it has loaded */
#ifdef NO_REWIND
            :: c[me].part == STANDBY && a <= c[me].done -> skip
#endif
            :: else ->
                 assert(a == c[me].done + 1);       /* links keep order */
                 c[me].state = c[me].state + POWER(c[me].done) * b;
                 c[me].done = a; c[me].step = 0
            fi;
            up(TAKEN, a + 1)
       :: kind == STEP && TAKES ->
            if :: c[me].part == STANDBY -> c[me].step = b :: else fi;
            up(STEPPED, 0)
       :: kind == PING && TAKES -> up(PONG, a)
       :: else -> up(REFUSED, 0)
       fi;
       kind = WHOLE; w = 0; e = 0; a = 0; b = 0 }

  /* ---- what comes to an owner; TAKEN tells one more than the number, so that none is 0 */
  :: atomic { ((me == 0 && nempty(up0)) || (me == 1 && nempty(up1))) ->
       if :: me == 0 -> up0?kind,w,a :: me == 1 -> up1?kind,w,a fi;
       if
       :: kind == TAKEN && c[me].part == OWNER && FOLLOWED && OF_THIS_STREAM ->
            if :: c[me].taken < a -> c[me].taken = a :: else fi
       :: kind == STEPPED && c[me].part == OWNER && FOLLOWED && OF_THIS_STREAM && BUSY ->
            c[me].stepped = 1
       :: kind == PONG && c[me].part == OWNER && FOLLOWED && OF_THIS_STREAM &&
          reading && at_node == me &&
#ifdef READ_EARLY
          true ->
#else
          a == reads ->
#endif
            assert(seen >= known_then); tell(seen, seen_state);
            reading = 0; seen = 0; seen_state = 0; known_then = 0
       :: else -> skip
       fi;
       kind = WHOLE; w = 0; e = 0; a = 0 }

  /* ---- memory is lost, once; not that of an owner that has nobody else */
  :: atomic { !forgot && c[me].part != NONE && !(owner == me && standby == NOBODY) ->
       forgot = 1; forgot_at = c[me].stream; deposed(); c[me].done = 0; c[me].state = 0; c[me].least = 0 }

#ifdef FENCE_LATE
  :: atomic { c[me].part == PROMOTING && c[me].least == c[me].epoch &&
       epoch == c[me].epoch + 1 && owner == me -> c[me].least = c[me].epoch + 1 }
#endif
  od
}

init {
  atomic {
    c[0].part = OWNER; c[0].epoch = 1; c[1].part = STANDBY; c[1].epoch = 1; c[1].least = 1;
    c[0].stream = 1; c[1].stream = 1;
    run Node(0); run Node(1)
  }
}
