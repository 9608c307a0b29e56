-- Remove hints whose jobs wait no longer, unless somebody has scored them anew since they were taken.
-- KEYS[1] queue: sorted set, job id -> due time (ms)
-- ARGV[1] prefix of the payload keys
-- ARGV[2…] for each hint: job id, the score that its claim wrote
-- returns how many hints were removed
local PAGE = 1000 -- ids in one call: Lua's stack holds some thousands
local dropped = 0
for first = 2, #ARGV, 2 * PAGE do
  local ids = {}
  for i = first, math.min(first + 2 * PAGE - 2, #ARGV), 2 do
    ids[#ids + 1] = ARGV[i]
  end
  local hints, payloads = {}, {}
  for n, score in ipairs(redis.call('ZMSCORE', KEYS[1], unpack(ids))) do
    local ours = score and tonumber(score) == tonumber(ARGV[first + 2 * n - 1])
    if ours then
      hints[#hints + 1] = ids[n]
    end
    if ours or not score then -- the payload of a hint that was evicted is of no use to anybody
      payloads[#payloads + 1] = ARGV[1] .. ids[n]
    end
  end
  if #hints > 0 then
    dropped = dropped + redis.call('ZREM', KEYS[1], unpack(hints))
  end
  if #payloads > 0 then
    redis.call('DEL', unpack(payloads))
  end
end
return dropped
